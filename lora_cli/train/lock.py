"""Lock a run's folder while a process trains in it.

The system's own lock on `.lock` (`filelock`: flock, or LockFileEx on Windows), whose text names
host and process for those who are refused. The system gives it up when its process ends, however it
ends, so a lock that was left behind stops nobody; `filelock` closes it in forked children, so that
a data loader's worker that outlives a killed run does not hold it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_cli.common import LoraError

FILE = ".lock"
START = 1
"""Where in the file the owner's name starts: on Windows nobody else can read the byte before it."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Own the folder, which exists, inside the block.

    LoraError naming host and process where another process owns it.
    """
    path = folder / FILE
    # A lock that is a file's mere presence would outlive its process: fail where the disk knows no
    # other
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        host, process = _read_owner(path)
        raise LoraError(
            f"{folder} is in use by process {process} on {host}",
            f"wait for it, or end it (on {host}: kill {process}); --set output_dir=… starts "
            "another run",
        ) from None
    try:
        _write_owner(path)
        yield
    finally:
        lock.release()  # in a forked child, which does not hold it, this does nothing


def _write_owner(path: Path) -> None:
    """Name this process as a line of the file; what a longer one leaves behind it is not read."""
    with path.open("r+b", buffering=0) as file:
        file.seek(START)
        file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())


def _read_owner(path: Path) -> tuple[str, str]:
    """Host and process, as far as the owner has come to write them."""
    with path.open("rb", buffering=0) as file:
        file.seek(START)
        line = file.read(1000).decode(errors="replace").partition("\n")[0]
    host, _, process = line.partition(" ")
    return host or "?", process or "?"
