"""Let one process at a time write to a place: a run's folder, or a folder or file to be made.

The system's own lock on a file (`filelock`: flock, or LockFileEx on Windows), whose text names host
and process for those who are refused. The system gives it up when its process ends, however it
ends, so one that was left behind stops nobody; `filelock` closes it in forked children, so that a
data loader's worker that outlives a killed run does not hold it. Whoever held it removes the file
while it is locked, and `filelock` takes no lock on a file that has lost its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.common import endings, ui
from lora_cli.common.errors import LoraError
from lora_cli.common.shown import quote

FILE = ".lock"
NAME = re.compile(r"\.lora-[0-9a-f]{16}\.lock")
START = 1
"""Where in the file the owner's name starts: on Windows nobody else can read the byte before it."""
TRIES = 100
"""How often the owner's name is looked for, 10 ms apart: a new owner has still to write it."""
PAUSE = 0.1
"""Seconds between two tries of who waits."""

if TYPE_CHECKING:
    from filelock import FileLock

_held = set[Path]()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_held.clear)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Own a run's folder, which exists, inside the block.

    LoraError naming host and process where another process owns it.
    """
    with _hold(folder / FILE, folder, "; --set output_dir=… starts another run"):
        yield


def find_owner(folder: Path) -> str | None:
    """Return who owns a run's folder, such as `process 12 on host`; None where nobody does.

    LoraError where this user may not know.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    with _try(path, folder) as mine:
        if mine:
            return None
    host, process = _read_owner(path)
    return f"process {process} on {host}" if process else None


@contextmanager
def hold(*targets: Path) -> Iterator[None]:
    """Be the only one who makes these files or folders, in folders that exist, inside the block.

    LoraError naming host and process where another process makes one of them.
    """
    with ExitStack() as stack:
        for target in targets:
            path = _name_lock(target)
            if path not in _held:
                stack.enter_context(_hold(path, target, ", or write elsewhere"))
        yield


@contextmanager
def hold_in_turn(target: Path, purpose: str) -> Iterator[None]:
    """Be the only one who makes this file or folder inside the block; wait, and say for whom and
    for what `purpose`, while another process makes it."""
    path, said, unnamed = _name_lock(target), False, 0
    while unnamed < TRIES:
        with _try(path, target) as mine:
            if mine:
                _write_owner(path)
                yield
                return
        host, process = _read_owner(path)
        if process and not said:
            ui.say(f"  waiting for process {process} on {host}, which {purpose}")
            said = True
        unnamed = 0 if process else unnamed + 1
        time.sleep(PAUSE)
    raise _explain_no_file(path, target)


def hold_with_others(folder: Path) -> Callable[[], bool]:
    """Hold a folder, as others may at the same time, until this process ends, however it ends;
    return what gives it up before.

    Raises OSError where no file can be made in it.
    """
    from filelock import FileLock, Timeout

    for _ in range(TRIES):
        path = folder / f".lora-{secrets.token_hex(8)}.lock"
        lock = FileLock(path, blocking=False, fallback_to_soft=False)
        give_up = partial(_give_up, lock, path, os.getpid())
        try:
            with endings.postponed_signals():
                lock.acquire()
                endings.undo_with_process(give_up)
        except Timeout:  # who looks for leftovers had the new file locked, and removes it
            continue
        _write_owner(path)
        return give_up
    raise _explain_no_file(path, folder)


def find_holders(folder: Path) -> list[str]:
    """Return who holds a folder with others, such as `process 12 on host`; what those who have
    ended left behind is removed."""
    found, paths = list[str](), list[Path]()
    with suppress(FileNotFoundError):  # it has just been removed
        paths = sorted(folder.iterdir())
    for path in paths:
        if NAME.fullmatch(path.name) and (holder := _find_holder(path, folder)):
            found.append(holder)
    return found


def _find_holder(path: Path, folder: Path) -> str | None:
    for tried in range(3):
        if tried:  # who only looks, as this does, is none, and soon gone
            time.sleep(0.01)
        with _try(path, folder) as mine:
            if mine:
                return None
    host, process = _read_owner(path)
    return f"process {process} on {host}" if process else "a process"


def _name_lock(target: Path) -> Path:
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.parent.resolve() / f".lora-{name}.lock"


def remove_leftover(path: Path) -> None:
    """Remove the file of a lock that nobody holds."""
    with suppress(LoraError), _try(path, path):
        pass


@contextmanager
def _hold(path: Path, owned: Path, instead: str) -> Iterator[None]:
    for tried in range(TRIES):
        with _try(path, owned) as mine:
            if mine:
                _write_owner(path)
                _held.add(path)
                yield
                return
        host, process = _read_owner(path)
        if process and tried > 2:  # who has just ended, or only removes the file, is no reason
            break
        time.sleep(0.01)
    if not process:
        raise _explain_no_file(path, owned)
    raise LoraError(
        f"{owned} is in use by process {process} on {host}",
        f"wait for it, or end it (on {host}: kill {quote(process)}){instead}",
    )


def _explain_no_file(path: Path, owned: Path) -> LoraError:
    return LoraError(
        f"{owned} cannot be made: no file can be made in {path.parent}",
        f"ls -ld {quote(path.parent)}",
    )


@contextmanager
def _try(path: Path, owned: Path) -> Iterator[bool]:
    """Yield whether the lock is held; LoraError where it cannot be."""
    from filelock import FileLock, Timeout  # 50 ms, which light commands need not spend

    # A lock that is a file's mere presence would outlive its process: fail where the disk knows no
    # other
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    with ExitStack() as stack:
        try:
            with endings.postponed_signals():
                lock.acquire()
                stack.enter_context(endings.undone(partial(_give_up, lock, path, os.getpid())))
        except Timeout:
            pass
        except OSError as error:
            raise LoraError(
                f"{owned} cannot be written: {path.name}: {error.strerror}",
                f"ls -la {quote(path.parent)}",
            ) from error
        yield lock.is_locked


def _give_up(lock: FileLock, path: Path, owner: int) -> bool:
    if os.getpid() == owner:  # a forked child does not hold it
        _held.discard(path)
        with suppress(OSError):  # Windows keeps the name of what is open
            path.unlink()
    lock.release()
    return True


def _write_owner(path: Path) -> None:
    """Name this process as a line of the file; what a longer one leaves behind it is not read."""
    with path.open("r+b", buffering=0) as file:
        file.seek(START)
        file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())


def _read_owner(path: Path) -> tuple[str, str]:
    """Host and process, as far as the owner has come to write them; nothing where it has gone."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(START)
            line = file.read(1000).decode(errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return "", ""
    host, _, process = line.partition(" ")
    return host, process
