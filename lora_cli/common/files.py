"""Write files and folders so that they appear under their final name only when they are
complete."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli.common import privacy, ui
from lora_cli.common.errors import LoraError, RejectedError, quote


def find_cache_home() -> Path:
    """Return the program's own folder in the user's cache, whether or not it exists:
    `<cache>/lora-cli`.

    `<cache>` is $LORA_CACHE_DIR, else $XDG_CACHE_HOME, else the platform's own (~/.cache,
    ~/Library/Caches).
    """
    usual = "~/Library/Caches" if platform.system() == "Darwin" else "~/.cache"
    cache = os.environ.get("LORA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or usual
    return Path(cache).expanduser().resolve() / "lora-cli"


MADE_HERE = ("record.json", "lora_record.json")
"""A folder that holds one of these files was made by lora, so a hint may suggest removing it."""
SMALL = 2**24
"""The largest configuration file that is read, in bytes."""
_passing = set[Path]()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_passing.clear)  # a child makes its own


@contextmanager
def passing(path: Path) -> Iterator[None]:
    """`path`, a file or folder that the block makes, is gone after it, at whatever instant a signal
    ends the block.

    It is noted before it is made. A signal amid the removal leaves the rest of that to the
    process's end. What already has the name goes first: a dead process's of our number, or a link
    that somebody has put there.
    """
    path = path.absolute()
    _remove(path)
    _passing.add(path)
    try:
        yield
    finally:
        _remove(path)
        if not path.exists():
            _passing.discard(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():  # neither lies below a file
        path.unlink(missing_ok=True)


@atexit.register
def _remove_the_rest() -> None:
    while _passing:
        _remove(_passing.pop())


def _stamp() -> str:
    """Return what tells this process from all others, on this machine and on those that share its
    disks. Containers may share a machine's name, but each numbers its own processes."""
    numbering = ""
    with suppress(OSError):  # Linux alone has it
        numbering = str(Path("/proc/self/ns/pid").readlink())
    host = hashlib.sha256(f"{platform.node()} {numbering}".encode()).hexdigest()[:8]
    return f"{os.getpid()}-{host}"


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove what a process of this machine that was killed had in the making in `parent`: names
    that `pattern` matches, its first group a stamp."""
    import psutil  # 20 ms, which light commands need not spend

    ours = _stamp().partition("-")[2]
    for path in parent.iterdir() if parent.is_dir() else ():
        found = re.fullmatch(pattern, path.name)
        number, _, host = found[1].partition("-") if found else ("", "", "")
        if host == ours and number.isdigit() and not psutil.pid_exists(int(number)):
            _remove(path)
            if not path.exists():  # it may be another user's
                ui.say(f"removed {path}, which a process that was killed had left")


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder of our own in `parent`, or among the system's temporary ones, that goes away
    with all that is in it.

    Not tempfile's, which names a folder to nobody before it has made it.
    """
    parent = parent or Path(tempfile.gettempdir())
    folder = _name_scratch(prefix, parent)
    with passing(folder):
        folder.mkdir(mode=0o700)
        yield folder


def _name_scratch(prefix: str, parent: Path) -> Path:
    """Return a name that no scratch folder in `parent` has, and remove those that were left."""
    remove_leftovers(parent, rf"{re.escape(prefix)}(.+)-[0-9a-f]{{16}}")
    return parent / f"{prefix}{_stamp()}-{secrets.token_hex(8)}"


def make_passing_folder(prefix: str) -> Path:
    """Make a folder among the system's temporary ones that goes away with the process."""
    folder = _name_scratch(prefix, Path(tempfile.gettempdir()))
    _passing.add(folder)
    folder.mkdir(mode=0o700)
    return folder


def read_small(path: Path, most: int = SMALL) -> str:
    """Return the text of a plain file of at most `most` bytes.

    Raise LoraError for anything else, such as a pipe, a device or a larger file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise LoraError(
                f"{path} is {_name_kind(status.st_mode)}, not a file", f"ls -ld {quote(path)}"
            )
        if status.st_size > most:
            raise LoraError(
                f"{path} is too large: {status.st_size} bytes, and at most {most} are read",
                f"less {quote(path)}",
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise LoraError(f"{path} does not exist", f"ls {quote(path.parent)}") from None
    except UnicodeDecodeError as error:
        raise LoraError(
            f"{path} is not UTF-8 text (byte {error.start})", "save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise LoraError(f"{path} cannot be read: {said}", f"ls -ld {quote(path)}") from None


def _name_kind(mode: int) -> str:
    """Return what a file that is not a plain one is, with its article."""
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, then rename; after a failure `path` is as it was.

    A symbolic link of that name is replaced, not followed.
    """
    staging = path.with_name(f".{path.name}.{_stamp()}.tmp")
    with passing(staging):
        with staging.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)


def leave_out_home(folder: Path) -> None:
    """Replace the user's home folder by ~ in the configurations and cards that libraries wrote into
    `folder`."""
    for path in (*folder.glob("*.json"), *folder.glob("*.md")):
        if path.name != "tokenizer.json" and path.stat().st_size <= SMALL:
            text = path.read_text(encoding="utf-8")
            portable = privacy.replace_home(text)
            if portable != text:
                write_text(path, portable)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON in `path`; raise LoraError naming the line where it is not valid."""
    text = read_small(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg}", f"less {quote(path)}"
        ) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        said = str(error).partition(";")[0]
        raise LoraError(
            f"{path}: JSON that cannot be read: {said}", f"less {quote(path)}"
        ) from None


@contextmanager
def staged_folder(final: Path, rejected: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `final`; rename it to `final` on success, remove it on failure.

    After a RejectedError it is renamed to `rejected` instead, if that is given. Neither may exist,
    except as an empty folder: LoraError otherwise, before anything is made.
    """
    for folder in [final, *([rejected] if rejected else [])]:
        refuse_occupied(folder)
    remove_leftovers(final.parent, rf"\.{re.escape(final.name)}\.(.+)\.tmp")
    staging = final.with_name(f".{final.name}.{_stamp()}.tmp")
    with passing(staging):
        make_folder(staging, final)
        try:
            yield staging
            if final.exists():
                final.rmdir()
            staging.rename(final)
        except RejectedError:
            if rejected:
                staging.rename(rejected)
            raise


def refuse_existing(targets: Iterable[Path]) -> None:
    """Raise LoraError for the first of these files that exists."""
    for target in targets:
        if target.exists() or target.is_symlink():
            raise LoraError(f"{target} already exists", f"rm {quote(target)}")


def name_artefact(folder: Path) -> str:
    """Return the stem for files made from the result in `folder`: its name, or its run's name where
    the folder's says nothing (`adapter`, `merged`)."""
    name = folder.resolve().name
    return name if name not in ("adapter", "merged") else folder.resolve().parent.name


def make_folder(folder: Path, final: Path | None = None) -> None:
    """Make `folder` and its parents; raise LoraError where that fails.

    The error names `final` if it is given: the folder that `folder` is staged for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        named = final or folder
        raise LoraError(
            f"{named} cannot be made: {error.strerror}", f"ls -ld {quote(named.parent)}"
        ) from error


def refuse_unmakable(folder: Path) -> None:
    """Raise LoraError where `folder` cannot be made, by making what is missing of it for a
    moment."""
    missing = folder.absolute()
    while not os.path.lexists(missing.parent):
        missing = missing.parent
    try:
        if folder.is_dir():
            return
        if os.path.lexists(missing):
            raise FileExistsError(errno.EEXIST, "a file has that name")
        with passing(missing):
            folder.mkdir(parents=True)
    except OSError as error:
        raise LoraError(
            f"{folder} cannot be made: {error.strerror}", f"ls -ld {quote(missing.parent)}"
        ) from error


@contextmanager
def scratch_beside_results(prefix: str, folder: Path) -> Iterator[Path]:
    """Make `folder` for results, and yield a scratch folder in it. Where `folder` was not there
    before and stays empty, it goes as well."""
    was_there = folder.exists()
    make_folder(folder)
    try:
        with scratch_folder(prefix, folder) as scratch:
            yield scratch
    finally:
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def refuse_link(folder: Path) -> None:
    """Raise LoraError if `folder` is a symbolic link: files would be written or removed elsewhere
    than it looks."""
    if folder.is_symlink():
        raise LoraError(
            f"{folder} is a link, to {folder.readlink()}",
            f"give that folder itself, or remove it: rm {quote(folder)}",
        )


def refuse_occupied(folder: Path) -> None:
    """Raise LoraError if `folder` exists and is not an empty folder, or contains the current
    folder."""
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise LoraError(
            f"{folder} is the current folder or above it", "give a folder that does not exist yet"
        )
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        hint = "choose another output"
        if folder.is_dir() and any((folder / name).is_file() for name in MADE_HERE):
            hint += f", or remove it: rm -r {quote(folder)}"
        raise LoraError(f"{folder} already exists", hint)
