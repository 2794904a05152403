"""The bases that were made of GGUF files and are kept in lora's cache: which there are, who uses
one, and removing one that nobody uses.

A base is `gguf/SHA256/NAME`. Each process that uses it holds a lock of its own beside that folder
until it ends, however it ends, and the time of the last use is that of the file SOURCE.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import LoraError, files, lock, quote
from lora_cli.models.record import GGUFSource

SOURCE = "gguf_source.json"
"""Beside a dequantised model: the file that it was made from."""
SHA256 = re.compile(r"[0-9a-f]{64}")
_held = set[tuple[Path, int]]()


class Kept(NamedTuple):
    """A base in the cache."""

    folder: Path
    source: GGUFSource
    size: int
    """Bytes of its files."""
    used: float
    """When it was used last, in seconds since 1970."""
    users: list[str]
    """Who uses it now, such as `process 12 on host`."""


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
    is used. Of any other folder, do nothing."""
    place = folder.absolute().parent
    is_kept = SHA256.fullmatch(place.name) and place.parent.name == "gguf"
    if not is_kept or (place, os.getpid()) in _held or not (folder / SOURCE).is_file():
        return
    with suppress(OSError):  # who may not write there cannot remove it either
        lock.hold_with_others(place)
        os.utime(folder / SOURCE)
    _held.add((place, os.getpid()))


def list_kept() -> list[Kept]:
    """Return the bases in the cache, the one that was used last first."""
    sweep()
    found = []
    for file in find_home().glob(f"*/[!.]*/{SOURCE}"):
        folder = file.parent
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        users = lock.find_holders(folder.parent)
        found.append(Kept(folder, GGUFSource.read(file), size, file.stat().st_mtime, users))
    return sorted(found, key=lambda each: -each.used)


def remove(kept: Kept) -> None:
    """Remove a base from the cache. Raises LoraError where a process uses it."""
    place = kept.folder.parent
    with lock.hold_in_turn(place, f"uses {kept.folder}"):
        if users := lock.find_holders(place):
            raise LoraError(
                f"{kept.folder} is in use by {', '.join(users)}", "wait for it, or end it"
            )
        if not files.remove(place):
            raise LoraError(f"{place} cannot be removed", f"ls -la {quote(place)}")
