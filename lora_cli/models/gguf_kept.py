"""The bases that were made of GGUF files and are kept in lora's cache: which there are, who uses
one, and removing one that nobody uses.

A base is `gguf/SHA256/NAME`. Each process that uses it holds a lock of its own beside that folder
until it ends, however it ends, and the time of the last use is that of the file SOURCE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import LoraError, endings, files, lock, quote
from lora_cli.models.record import GGUFSource

SOURCE = "gguf_source.json"
"""Beside a dequantised model: the file that it was made from."""
SHA256 = re.compile(r"[0-9a-f]{64}")
_held = set[tuple[Path, int]]()


class Kept(NamedTuple):
    """A base in the cache."""

    folder: Path
    source: GGUFSource | None
    """None where the file that says so is damaged."""
    size: int
    """Bytes of its files."""
    used: float
    """When it was used last, in seconds since 1970."""
    users: list[str]
    """Who uses it now, such as `process 12 on host`."""

    @property
    def digest(self) -> str:
        """The sha256 of the file that it was made from."""
        return self.folder.parent.name


def read_source(folder: str) -> GGUFSource | None:
    """Return the GGUF file that the model in a folder was made from; None for any other model."""
    file = Path(folder) / SOURCE
    return GGUFSource.read(file) if file.is_file() else None


def find_home() -> Path:
    """Return the folder of the cache for all of them."""
    return files.find_cache_home() / "gguf"


def find_place(digest: str) -> Path:
    """Return the folder of the cache for what is made from a file of this sha256."""
    return find_home() / digest


def sweep() -> None:
    """Remove what processes that were killed had in the making."""
    for place in find_home().glob("*/"):
        files.remove_leftovers(place)


def find_made(digest: str) -> Path | None:
    """Return the base that was made from a file of this sha256; None where it is not kept."""
    return next((file.parent for file in find_place(digest).glob(f"[!.]*/{SOURCE}")), None)


def hold(folder: Path) -> None:
    """Keep the base in a folder from being removed as long as this process lives, and note that it
    is used. Of any other folder, do nothing. LoraError where another process has just removed
    it."""
    place = folder.absolute().parent
    is_kept = SHA256.fullmatch(place.name) and place.parent.name == "gguf"
    if not is_kept or (place, os.getpid()) in _held or not (folder / SOURCE).is_file():
        return
    give_up = _hold_place(place)
    with suppress(OSError):  # another user's
        os.utime(folder / SOURCE)
    if not (folder / SOURCE).is_file():  # it went before there was a lock for `remove` to see
        give_up()
        with suppress(OSError):
            place.rmdir()
        raise LoraError(
            f"another process has just removed {folder}",
            "do it again, with the GGUF file as the base: it is dequantised anew",
        )
    _held.add((place, os.getpid()))


def _hold_place(place: Path) -> Callable[[], object]:
    """Hold a folder of the cache; return what gives it up again."""
    try:
        return lock.hold_with_others(place)
    except OSError:  # who may not write there cannot remove it either
        return list


def list_kept() -> list[Kept]:
    """Return the bases in the cache, the one that was used last first."""
    sweep()
    found = map(_look_at, find_home().glob(f"*/[!.]*/{SOURCE}"))
    return sorted((each for each in found if each), key=lambda each: -each.used)


def _look_at(file: Path) -> Kept | None:
    """Return the base beside a file SOURCE; None where another process has just removed it."""
    folder, source = file.parent, None
    with suppress(LoraError):
        source = GGUFSource.read(file)
    users, size = lock.find_holders(folder.parent), files.measure(folder)
    try:
        return Kept(folder, source, size, file.stat().st_mtime, users)
    except FileNotFoundError:
        return None


def remove(kept: Kept) -> None:
    """Remove a base from the cache. Raises LoraError where a process uses it, or has removed it."""
    folder, place = kept.folder, kept.folder.parent
    with lock.hold_in_turn(place, f"makes or removes {folder}"):
        if not folder.is_dir():
            raise LoraError(f"another process has just removed {folder}", "lora cache lists others")
        _refuse_used(folder)
        try:
            _remove_unused(folder)
        except OSError as error:
            raise LoraError(
                f"{folder} cannot be removed: {error.strerror}", f"ls -la {quote(place)}"
            ) from error
        with suppress(OSError):  # the lock of one who has come too late may be in it
            place.rmdir()


def _refuse_used(folder: Path) -> None:
    if users := lock.find_holders(folder.parent):
        raise LoraError(f"{folder} is in use by {', '.join(users)}", "wait for it, or end it")


def _remove_unused(folder: Path) -> None:
    """Remove a base; LoraError where somebody has come to use it meanwhile. Raises OSError."""
    # moved first, so that a kill never leaves half a base under its name, and `hold` sees it gone
    with files.scratch_folder(folder.parent) as scratch, endings.postponed_signals():
        folder.rename(scratch / folder.name)
        try:
            _refuse_used(folder)
        except BaseException:
            (scratch / folder.name).rename(folder)
            raise
    if scratch.exists():
        raise LoraError(f"{scratch} cannot be removed", f"ls -laR {quote(scratch)}")
