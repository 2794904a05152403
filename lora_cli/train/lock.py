"""Lock a run's folder while a process trains in it.

It is the kernel's lock (flock) on the file `.lock`, which names host and process for those who are
refused. The kernel releases it when its process ends, however it ends, so a lock file that was left
behind does not matter.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.common import LoraError

FILE = ".lock"
_open = set[int]()


def _close_in_child() -> None:
    """Close the lock that a data loader's worker inherits: it would outlive a killed parent."""
    for number in _open:
        os.close(number)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Own the folder, which exists, inside the block.

    LoraError naming host and process where another process owns it.
    """
    path = folder / FILE
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    _open.add(number)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(number, 1000, 0).decode(errors="replace").strip()
            host, _, process = owner.partition(" ")
            way_out = f"wait for it, or end it (on {host}: kill {process})"
            raise LoraError(
                f"{folder} is in use by process {process or '?'} on {host or '?'}",
                f"{way_out}; --set output_dir=… starts another run",
            ) from None
        os.truncate(number, 0)
        os.pwrite(number, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        yield
    finally:
        if number in _open:  # not in a forked child
            _open.discard(number)
            os.close(number)
