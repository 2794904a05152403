"""Installing llama.cpp's tools: nothing but the expected archive, nothing half done, two at once.

Hermetic: a fake source package in the place of pip's; no network. Alone: pytest
tests/gguf/test_install.py
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from lora_cli.common import LoraError
from lora_cli.gguf import install, tools
from lora_cli.gguf.tools import CONVERTER, Found

pytestmark = pytest.mark.usefixtures("bare")

TOP = f"llama_cpp_python-{tools.VERSION}/vendor/llama.cpp/"
CONVERTER_SOURCE = b"import torch\nfrom conversion import ModelBase\n"


def sdist(path: Path, extra: str = TOP + "conversion/llama.py") -> str:
    """A source package as small as it can be; returns its sha256."""
    names = [TOP + CONVERTER, TOP + "conversion/__init__.py", TOP + "gguf-py/gguf/__init__.py"]
    left_out = [
        TOP + "src/llama.cpp",
        TOP + "models/big.gguf",
        TOP + "ggml/src/ggml-cuda/a.cu",
        "llama_cpp_python-0.3.36/llama_cpp/x.py",
    ]
    with tarfile.open(path, "w:gz") as archive:
        for name in [*names, *left_out, extra]:
            member = tarfile.TarInfo(name)
            member.size = len(CONVERTER_SOURCE)
            archive.addfile(member, io.BytesIO(CONVERTER_SOURCE))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with one file in it, in the place of pip; the file is returned."""
    archive = tmp_path / "offered.tar.gz"
    monkeypatch.setattr(install, "SHA256", sdist(archive))
    install._unpack(archive, tmp_path / "unpacked")
    monkeypatch.setattr(tools, "DIGEST", tools.hash_installed(tmp_path / "unpacked"))
    monkeypatch.setattr(install, "_download_source", lambda folder: archive)
    return archive


def files_below(root: Path) -> set[str]:
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def test_install_keeps_what_is_needed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = install.install_converters()
    wanted = {
        CONVERTER,
        "conversion/__init__.py",
        "conversion/llama.py",
        "gguf-py/gguf/__init__.py",
    }
    assert files_below(home) == wanted
    assert list(home.parent.iterdir()) == [home]
    assert tools.find_converter() == Found(home / CONVERTER, "managed copy")
    index.unlink()
    assert install.install_converters() == home  # is there: nothing is fetched
    (home / "conversion").rename(tmp_path / "lost")
    with pytest.raises(FileNotFoundError):  # is not whole: fetched again
        install.install_converters()
    monkeypatch.setattr(install, "SHA256", sdist(index))
    assert files_below(install.install_converters()) == wanted


@pytest.mark.parametrize(
    "name",
    [CONVERTER, "conversion/llama.py", "conversion/new.py", "gguf-py/gguf/__init__.py", "torch.py", "numpy/__init__.py", "json.so", "conversion/__pycache__/llama.cpython-311.pyc"],
)  # fmt: skip
def test_a_copy_that_was_tampered_with_is_not_run_and_is_installed_again(
    name: str, index: Path
) -> None:
    home = install.install_converters()
    (home / name).parent.mkdir(exist_ok=True)
    with (home / name).open("a") as file:
        file.write("\nimport os\n")
    with pytest.raises(LoraError, match="is not as it was installed"):
        tools.find_converter()
    install.install_converters()
    assert tools.find_converter() == Found(home / CONVERTER, "managed copy")
    assert list(home.parent.iterdir()) == [home]


def test_the_managed_copy_is_the_one_that_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home() / ".cache" / "lora-cli" / tools.find_managed_home().name
    if home.is_dir():
        assert tools.hash_installed(home) == tools.DIGEST


def test_another_archive_is_refused(index: Path, tmp_path: Path) -> None:
    expected = install.SHA256
    got = sdist(index, TOP + "conversion/evil.py")
    assert got != expected
    with pytest.raises(LoraError) as caught:
        install.install_converters()
    assert caught.value.message == (
        f"offered.tar.gz is not the archive it should be: its sha256 is {got}, expected {expected}"
    )
    assert files_below(tmp_path / "cache") == set()


def test_no_member_leaves_the_folder(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "SHA256", sdist(index, TOP + "conversion/../../../../outside.py"))
    with pytest.raises(tarfile.OutsideDestinationError):
        install.install_converters()
    assert not list(tmp_path.rglob("outside.py"))


def test_two_installs_at_once_both_succeed(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_unpacked = threading.Barrier(2, timeout=600)
    rename = install._rename

    def rename_together(fresh: Path, home: Path) -> None:
        both_unpacked.wait()  # neither has found the other's copy
        rename(fresh, home)

    monkeypatch.setattr(install, "_rename", rename_together)
    results: list[Path | BaseException] = []

    def install_once() -> None:
        try:
            results.append(install.install_converters())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=install_once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    home = tools.find_managed_home()
    assert results == [home, home]
    assert list(home.parent.iterdir()) == [home]
    assert len(files_below(home)) == 4


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            f"{sys.executable}: No module named pip",
            "this Python has no pip",
            f"{sys.executable} -m ensurepip",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM",
            "another llama-cpp-python 0.3.36",
            "pip config list",
        ),
        (
            "ERROR: No matching distribution found",
            "fetch llama-cpp-python 0.3.36: No matching",
            "check the network",
        ),
    ],
)
def test_a_failed_download(
    said: str, message: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], label: str) -> tuple[int, list[str]]:
        commands.append(command)
        wanted = Path(command[-1]).read_text()
        assert wanted == f"llama-cpp-python=={tools.VERSION} --hash=sha256:{install.SHA256}\n"
        return 1, ["Looking in indexes", said, ""]

    monkeypatch.setattr(install, "run_command", pip)
    with pytest.raises(LoraError, match=message) as caught:
        install.install_converters()
    assert str(caught.value.hint).startswith(hint)
    assert [command[:3] for command in commands] == [[sys.executable, "-m", "pip"]]
    assert files_below(tmp_path / "cache") == set()


def test_imports_are_light() -> None:
    code = "import sys, lora_cli.gguf.install; print(*sys.modules)"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    modules = set(done.stdout.split())
    assert "lora_cli.gguf.tools" in modules
    assert not modules & {"torch", "numpy", "transformers", "typer", "pydantic"}
