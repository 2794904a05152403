"""The wheel: what is in it, and that it works where nothing else of this repository is.

The wheel is built here and installed into an environment of its own, in which the libraries are
those of the environment that runs the tests; the source tree is not importable there. Hermetic: no
network; the tiny model; the managed copy of llama.cpp's converters.
Alone: pytest tests/test_wheel.py; the quick part: -m "not slow"
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

from lora_cli import __version__
from lora_cli.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_cli"
SOURCES = [
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "Makefile",
    "constraints.txt",
    "tests/conftest.py",
]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it of this checkout, with the build backend that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"lora_cli-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == sources
    shipped = {name for name in names if re.match(r"lora_cli/recipe/shipped/[^/]+\.yaml$", name)}
    assert len(shipped) == len(shipped_recipes.list_recipes()) >= 6
    assert {"lora_cli/constraints.txt", "lora_cli/models/templates/alpaca.jinja"} < names


def test_the_source_package_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """As an index that has no wheel gives it to pip."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tmp_path / wheel.name) as from_source:
        contents = [
            {name: each.read(name) for name in each.namelist()} for each in (ours, from_source)
        ]
    assert len(contents[0]) > 300
    assert contents[0] == contents[1]
    with tarfile.open(tmp_path / f"lora_cli-{__version__}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in SOURCES:
        assert name in held, name


def test_the_wheel_says_how_it_is_run_and_on_which_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"lora_cli-{__version__}.dist-info"
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert "lora = lora_cli.__main__:main" in entry_points
    assert metadata["Requires-Python"] == ">=3.11"
    versions = [
        each.rpartition(" ")[2]
        for each in metadata.get_all("Classifier", [])
        if "Python :: 3." in each
    ]
    assert versions[0] == "3.11"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in versions


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, and a path to the libraries of this one. A line of a
    path file adds that folder, not what path files in it add: an editable install of the source
    there does not count."""
    environment = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / SCRIPTS / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    [site] = environment.rglob("site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """`run(program, *arguments)` runs a program of that environment in an empty folder, and returns
    its stdout."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    clean |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home")}
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(program: str, *arguments: object) -> str:
        command = [str(installed / SCRIPTS / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_what_is_imported_is_what_was_installed(run, installed: Path) -> None:
    code = "import lora_cli, sys, importlib.metadata as m; print(lora_cli.__file__, m.version('lora-cli'), *sys.path)"
    file, version, *folders = run("python", "-c", code).split()
    assert Path(file).is_relative_to(installed)
    assert version == __version__
    assert not {Path(folder).resolve() for folder in folders} & {ROOT.resolve(), PACKAGE.resolve()}


@pytest.mark.slow
def test_a_shipped_recipe_is_listed_copied_trained_merged_and_exported_in_an_empty_folder(
    run, tiny: Path, tmp_path: Path
) -> None:
    names = [line.split()[0] for line in run("lora", "recipes").splitlines()]
    assert "own-data" in names
    settings = [
        *(
            f"model.name_or_path={tiny / 'model'}",
            f"data.path={tiny / 'train.jsonl'}",
            "data.max_rows=64",
        ),
        *("data.columns.prompt=prompt", "data.columns.completion=completion"),
        *(
            "training.max_steps=4",
            "training.gradient_accumulation_steps=1",
            "training.max_length=128",
        ),
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    assert run("lora", "train", "own-data", *options).strip() == "runs/own-data/adapter"
    assert run("lora", "merge", "runs/own-data/adapter", "out").strip() == "out"
    files = run("lora", "export-gguf", "out", "--quantize", "q8_0").split()
    assert files == ["out/out-q8_0.gguf"]
    assert run("lora", "recipes", "copy", "own-data", "mine.yaml").strip() == "mine.yaml"
    assert "64 rows" in run("lora", "check", "mine.yaml", *options)
    made = {path.name for path in (tmp_path / "empty").iterdir()}
    assert made == {"runs", "out", "mine.yaml", "schema.json"}
