"""Fetch files of rows that are named by addresses: each once to this machine, whole or not at all.

A file is kept in the cache under a hash of its address and of what the store says of its version.
Other processes wait while one fetches it. From there on it is a local file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from lora_cli.common import LoraError, files, format_duration, lock, plain_files, stored, ui
from lora_cli.data import readers, stores

ABOUT = "about"
"""A file that no file of rows is called."""
QUIET, PAUSE = 2.0, 0.2
"""Seconds after which a fetch shows how far it is, and between two such lines."""


class Kept(stored.Stored):
    """What lies beside a fetched file: its version as the store called it, its size and hash, and
    when it was written here (ns)."""

    version: str
    size: stored.Count
    sha256: stored.Sha256
    written: stored.Count


class Names(stored.Stored):
    """The objects that a pattern stood for when it was asked last."""

    urls: list[str]


def find_folder() -> Path:
    """Return the folder of all fetched files."""
    return files.find_cache_home() / "fetched"


def fetch_all(field: str, name: str) -> list[Path]:
    """Return the local files of the objects that an address in data.`field` stands for, as it is or
    as a pattern."""
    readers.refuse_address(field, name)
    try:
        urls = _list_objects(name)
        for url in urls:
            readers.refuse_address(field, url)
        return [_fetch(url) for url in urls]
    except LoraError as error:
        prefix = f"data.{field}: "
        raise error.with_message(prefix + error.message.removeprefix(prefix)) from error


def _list_objects(name: str) -> list[str]:
    """Return the addresses of these objects; where the store does not answer, of those that were
    there last."""
    listing = _make_folder() / f"{_hash(name)}.json"
    try:
        with stores.translate(name):
            urls = stores.list_objects(name)
    except stores.Unreachable as error:
        if not listing.is_file():
            raise
        ui.warn(f"{error.message}: what it stood for on {_date(listing)} is taken")
        return Names.read(listing).urls
    if not urls:
        raise LoraError(f"no object matches {name}", stores.suggest_listing(name))
    if urls != [name]:
        files.write_json(listing, Names(urls=urls).to_data())
    return urls


def _fetch(url: str) -> Path:
    """Return the local file of an object, fetched unless the cache has this version of it.

    Where the store does not answer, return the version that was fetched last. Raise LoraError where
    there is none, and for whatever else goes wrong.
    """
    place = _make_folder() / _hash(url)
    with lock.hold_in_turn(place, f"fetches {url}"):
        newest = _find_newest(place)
        known = Kept.read(newest.with_name(ABOUT)).version if newest else ""
        try:
            return _take_version(place, url, newest, known)
        except stores.Unreachable as error:
            if newest is None:
                raise
            when = _date(newest)
            ui.warn(f"{error.message}: what was fetched of it on {when} is taken, {newest}")
            return newest


def _make_folder() -> Path:
    folder = find_folder()
    try:
        files.make_cache_folder(folder)
    except OSError as error:
        raise LoraError(
            f"fetched files cannot be kept in {folder}: {error.strerror}",
            "set LORA_CACHE_DIR to another folder",
        ) from error
    return folder


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def _find_newest(place: Path) -> Path | None:
    """Return the file that was fetched last of an object; remove entries that were changed since,
    or are another user's."""
    found = []
    for entry in place.parent.glob(f"{place.name}-*"):
        file = _find_file(entry)
        if file is None:
            ui.warn(f"{entry} is not as it was fetched: it is fetched anew")
            files.remove(entry)
        else:
            found.append(file)
    return max(found, key=lambda file: file.with_name(ABOUT).stat().st_mtime_ns, default=None)


def _find_file(entry: Path) -> Path | None:
    """Return the file of an entry, or None where it is not what was written."""
    try:
        kept = Kept.read(entry / ABOUT)
        [file] = (path for path in entry.iterdir() if path.name != ABOUT)
        plain_files.refuse_odd(file, status := file.lstat())
        if hasattr(os, "getuid") and entry.stat().st_uid != os.getuid():
            return None
        same = status.st_mtime_ns == kept.written or _hash_content(file) == kept.sha256
    except (LoraError, OSError, ValueError):
        return None
    return file if same and status.st_size == kept.size else None


def _take_version(place: Path, url: str, newest: Path | None, known: str) -> Path:
    """Return the file of the version that the store has now: `newest`, whose version is `known`,
    another one that is kept, or one that is fetched."""
    with ExitStack() as stack:
        with stores.translate(url):
            found = stack.enter_context(stores.open_object(url, known))
        if found is None:
            assert newest is not None
            return _take(newest, url)
        entry = _name_entry(place, found.version)
        if found.version and (file := _find_file(entry)):
            return _take(file, url)
        _refuse_lack_of_room(url, place.parent, found.size)
        return _write(place, url, found)


def _name_entry(place: Path, version: str) -> Path:
    return place.with_name(f"{place.name}-{_hash(version)[:16]}")


def _take(file: Path, url: str) -> Path:
    os.utime(file.with_name(ABOUT))
    ui.say(f"  {url}: fetched before, {file}")
    return file


def _refuse_lack_of_room(url: str, folder: Path, size: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise LoraError(
            f"{url} has {size:,} bytes, and {folder} has room for {free:,}",
            "make room, or set LORA_CACHE_DIR to a folder on another disk",
        )


def _write(place: Path, url: str, found: stores.Found) -> Path:
    """Copy an object into a new entry, which appears when all of it is there."""
    began = time.monotonic()
    with files.scratch_folder(place.parent) as staging:
        fresh = staging / "entry"
        fresh.mkdir(mode=0o700)
        file = fresh / stores.name_file(url)
        size = _copy(found, url, file)
        digest = _hash_content(file)
        version, written = found.version or digest, file.stat().st_mtime_ns
        kept = Kept(version=version, size=size, sha256=digest, written=written)
        files.write_json(fresh / ABOUT, kept.to_data())
        files.remove_unused(place.parent, ABOUT)
        entry = _name_entry(place, version)
        if same := _find_file(entry):
            return _take(same, url)
        files.remove(entry)
        fresh.rename(entry)
    took = format_duration(time.monotonic() - began)
    ui.say(f"  {url}: {size:,} bytes fetched in {took}, {entry / file.name}")
    return entry / file.name


def _copy(found: stores.Found, url: str, file: Path) -> int:
    """Copy an object to a file, down to the disk; return its size. Raise LoraError where not all of
    it came."""
    progress = ui.Progress()
    try:
        with stores.translate(url):
            found.copy(file, _show_bytes(progress, url, found.size))
    except stores.Unreachable as error:
        done = file.stat().st_size if file.exists() else 0
        said = error.message.removeprefix(f"{url} cannot be reached: ")
        broken = f"{url} broke off after {done:,} bytes: {said}"
        raise LoraError(broken, "run it again") from error
    finally:
        progress.clear()
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        size = os.fstat(stream.fileno()).st_size
    if found.size not in (None, size):
        raise LoraError(f"{url} was cut off: {size:,} of {found.size:,} bytes came", "run it again")
    return size


def _hash_content(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _show_bytes(progress: ui.Progress, url: str, size: int | None) -> Callable[[int], None]:
    """Return what shows how many bytes have come, where that takes long."""
    shown = time.monotonic() + QUIET

    def show(done: int) -> None:
        nonlocal shown
        if (now := time.monotonic()) >= shown:
            shown = now + PAUSE
            of = f" of {size / 1e6:,.1f}" if size is not None else ""
            progress.update(f"  {url}", f"{done / 1e6:,.1f}{of} MB")

    return show
