"""Install llama.cpp's converters into the managed copy that `tools.py` searches last.

They are three things of one revision (two scripts, `conversion/`, `gguf-py/`). The source package
of llama-cpp-python carries all three, so pip fetches it: from the index pip is configured for,
checked against one sha256. Everything lands under its final name by one rename, so processes may
race.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import time
from pathlib import Path

from lora_cli.common import LoraError, files, format_duration, say
from lora_cli.gguf import tools
from lora_cli.gguf.tools import (
    INSTALLED,
    VERSION,
    find_last_line,
    find_managed_home,
    hash_installed,
    run_command,
)

SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of llama_cpp_python-<VERSION>.tar.gz, 77 MB."""


def install_converters() -> Path:
    """Install both converters into the managed copy; returns its folder.

    Does nothing where they are. Downloads 77 MB. Raises LoraError when pip fails or brings another
    archive.
    """
    home = find_managed_home()
    if hash_installed(home) == tools.DIGEST:
        return home
    say(f"downloading llama.cpp (source package of llama-cpp-python {VERSION}, 77 MB)")
    started = time.monotonic()
    files.make_cache_folder(home.parent)
    with files.scratch_folder(home.parent) as folder:
        fresh = folder / "llama.cpp"
        _unpack(_download_source(folder), fresh)
        _rename(fresh, home)
    say(f"llama.cpp's converters are in {home} ({format_duration(time.monotonic() - started)})")
    return home


def _download_source(folder: Path) -> Path:
    """Download the source package with pip. It is named with its hash, so that pip runs nothing of
    another archive."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = _pip(
        "download",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "--dest",
        str(folder),
        "-r",
        str(wanted),
    )
    code, lines = run_command(command, "downloading")
    if code:
        raise _explain_pip(f"llama-cpp-python {VERSION}", lines)
    return folder / f"llama_cpp_python-{VERSION}.tar.gz"


def _unpack(sdist: Path, target: Path) -> None:
    """Unpack what is to be installed of `sdist` below `target`. Raises LoraError when its sha256 is
    another one."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        raise LoraError(
            f"{sdist.name} is not the archive it should be: its sha256 is {digest}, expected "
            f"{SHA256}",
            "try again; if it stays so, ask who runs the package index or its mirror: pip config "
            "list",
        )
    top = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(top)
            if name != member.name and member.isfile() and INSTALLED.fullmatch(name):
                archive.extract(member.replace(name=name), target, filter="data")


def _rename(fresh: Path, home: Path) -> None:
    """Give `fresh` its final name, unless another process was first."""
    if os.path.lexists(home) and hash_installed(home) != tools.DIGEST:
        home.rename(fresh.with_name("incomplete"))  # goes away with the temporary folder
    try:
        fresh.rename(home)
    except OSError:
        if hash_installed(home) != tools.DIGEST:
            raise


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def _explain_pip(what: str, lines: list[str]) -> LoraError:
    said = find_last_line(lines)
    if "No module named pip" in said:
        return LoraError(
            f"this Python has no pip to fetch {what} with", f"{sys.executable} -m ensurepip"
        )
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return LoraError(
            f"the package index offers another {what} than the expected one (sha256)",
            "pip config list",
        )
    return LoraError(
        f"pip could not fetch {what}: {said}",
        "check the network and `pip config list`, or point LLAMA_CPP_DIR at a llama.cpp checkout",
    )
