"""What the pages say to install by, typed as it stands there: in an empty environment, with the
oldest pip that they ask for.

`lora-cli` is on no index: pip finds the wheel of this checkout in a folder of links, and takes all
else in the versions that it is tested with. Slow, and not hermetic: the package index, some 2 GB of
libraries. Alone: pytest -m slow tests/docs/test_pip_lines.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_cli import __version__
from tests.docs.pages import ROOT, read_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
LINES = list(
    dict.fromkeys(
        command
        for path in PAGES
        for step in read_page(path)
        if step.kind == "alone"
        for command in step.commands
    )
)
"""What the pages say to type in an empty environment."""
OLDEST, TOO_OLD = "21.3", "21.2.4"
"""pip: what the pages ask for, and the last before it."""


def make_environment(folder: Path, pip: str) -> dict[str, str]:
    """A virtual environment with nothing but this pip; what a shell in it has around."""
    fetched = folder / "pip"
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", fetched]
    subprocess.run([*fetch, f"pip=={pip}"], check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [site] = environment.rglob("site-packages")
    [wheel] = fetched.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = environment / "bin" / "pip"
    program.write_text(f'#!/bin/sh\nexec {environment / "bin" / "python"} -m pip "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def build_wheel(folder: Path) -> Path:
    """This checkout's wheel."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder, ROOT], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def type_line(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and all that was printed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_the_pages_say_which_pip() -> None:
    assert LINES == ["pip install 'lora-cli[gguf]'"]
    saying = [
        path for path in PAGES if re.search(rf"pip {re.escape(OLDEST)} or later", path.read_text())
    ]
    assert {path.name for path in saying} == {"README.md", "five-minutes.md"}


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_the_line_of_the_page_installs(line: str, tmp_path: Path) -> None:
    environment = make_environment(tmp_path, OLDEST)
    wheel = build_wheel(tmp_path)
    environment["PIP_CONSTRAINT"] = str(ROOT / "lora_cli" / "constraints.txt")
    environment["PIP_FIND_LINKS"] = f"{os.environ.get('PIP_FIND_LINKS', '')} {tmp_path}".strip()
    work = tmp_path / "work"
    status, printed = type_line(line, work, environment)
    assert status == 0, printed
    assert f"Processing {wheel}" in printed, "another lora-cli"
    assert type_line("lora --version", work, environment) == (0, f"lora {__version__}\n")
    where = type_line("python -c 'import lora_cli; print(lora_cli.__file__)'", work, environment)[1]
    assert Path(where.strip()).is_relative_to(tmp_path), "not this checkout's"
    status, printed = type_line("lora doctor", work, environment)
    assert status == 0, printed
    assert "llama.cpp engine: xllamacpp" in printed


@pytest.mark.slow
def test_a_checkout_is_installed_by_that_pip_and_not_by_the_one_before(tmp_path: Path) -> None:
    for pip, wanted in ((TOO_OLD, 1), (OLDEST, 0)):
        environment = make_environment(tmp_path / pip, pip)
        line = f"pip install --no-deps -e {ROOT}"
        status, printed = type_line(line, tmp_path / "work", environment)
        assert status == wanted, printed
        refused = 'File "setup.py" or "setup.cfg" not found' in printed
        assert refused == bool(wanted), printed
        found = type_line("pip list", tmp_path / "work", environment)[1]
        assert ("lora-cli" in found) != bool(wanted)
