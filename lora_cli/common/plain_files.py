"""The door for files and folders of others: what is opened is a plain file, and lies where it seems
to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lora_cli.common.errors import LoraError, find_nearest
from lora_cli.common.shown import quote

SMALL = 2**24
"""The largest configuration file that is read, in bytes."""
LOOKED_AT = 1000
"""Names of a folder that are compared with one that is missing: it takes 20 ms."""
AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # a pipe is opened, and seen to be one


def is_gguf(path: Path | str) -> bool:
    """Return whether a path is that of a GGUF file: by its name, which ends in .gguf in any case,
    where it need not be there, or by its first four bytes (Ollama's files have no ending)."""
    path = Path(path)
    if path.is_dir():
        return False
    return has_gguf_name(path) or (path.is_file() and _read_start(path) == b"GGUF")


def has_gguf_name(path: Path) -> bool:
    """Return whether a path is called as GGUF files are, where there are too many to be opened."""
    return path.suffix.lower() == ".gguf"


def _read_start(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=open_plain) as file:
            return file.read(4)
    except (OSError, LoraError):  # whoever opens it says why it cannot be read
        return b""


def refuse_odd_files(folder: Path) -> None:
    """Raise LoraError for the first pipe, device or socket in `folder` or below it, and for a link
    that leads out of it: before a library opens or copies what it finds there.

    Hidden folders are left out, since nothing is read in them. In the hub's cache, files are links
    to the repository's blobs.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in _walk(folder):
        if path.is_symlink():
            target = Path(os.path.realpath(path))  # of a link to itself too
            if not any(target.is_relative_to(each) for each in allowed):
                raise LoraError(
                    f"{path} is a link out of its folder, to {target}",
                    f"if you trust it: cp -rL {quote(folder)} COPY, and give that",
                )
        if path.exists() and not path.is_dir():
            refuse_odd(path, path.stat())


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below it, and links to folders."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in files)
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())
        folders[:] = [name for name in folders if not name.startswith(".")]


def refuse_odd(path: Path, status: os.stat_result) -> None:
    """Raise LoraError where the status is not that of a plain file."""
    if not stat.S_ISREG(status.st_mode):
        raise LoraError(
            f"{path} is {_name_kind(status.st_mode)}, not a file", f"ls -ld {quote(path)}"
        )


def open_plain(path: str, flags: int) -> int:
    """Open a plain file, as an `opener` of open(); LoraError for another kind of thing, which keeps
    nobody waiting."""
    number = os.open(path, flags | AT_ONCE)
    try:
        refuse_odd(Path(path), os.fstat(number))
    except BaseException:
        os.close(number)
        raise
    return number


def read_small(path: Path, most: int = SMALL) -> str:
    """Return the text of a plain file of at most `most` bytes.

    Raise LoraError for anything else, such as a pipe, a device or a larger file.
    """
    try:
        with open(path, "rb", opener=open_plain) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise LoraError(
                    f"{path} is too large: {size} bytes, and at most {most} are read",
                    f"less {quote(path)}",
                )
            return file.read(most).decode("utf-8-sig")
    except FileNotFoundError:
        raise LoraError(f"{path} does not exist", suggest_other(path)) from None
    except UnicodeDecodeError as error:
        raise LoraError(
            f"{path} is not UTF-8 text (byte {error.start})", "save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise LoraError(f"{path} cannot be read: {said}", f"ls -ld {quote(path)}") from None


def suggest_other(path: Path) -> str:
    """Return the hint for a path that does not exist: the path of nearest name, else the command
    that lists the folder in which it would be, or the first above that exists."""
    near = find_near(path)
    return f"did you mean {quote(near)}?" if near else f"ls {quote(_find_folder(path))}"


def find_near(path: Path) -> Path | None:
    """Return the path that one that does not exist most likely meant: one of its folders, or
    itself, has a name like that of one that is there. None where there is none."""
    folder = _find_folder(path)
    parts = path.parts[len(folder.parts) :]
    if not parts:
        return None
    missing, *rest = parts
    try:
        found = find_nearest(missing, (each.name for each in islice(folder.iterdir(), LOOKED_AT)))
    except OSError:  # a folder that may not be read
        return None
    other = folder.joinpath(found, *rest) if found else None
    return other if other and other.exists() else None


def find_existing(path: Path) -> Path:
    """Return the path where there is something of that name, else the first above it that is
    there: what `ls -ld` and `df` can be asked about."""
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), Path())


def _find_folder(path: Path) -> Path:
    return next((each for each in path.parents if each.is_dir()), Path())


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
