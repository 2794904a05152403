"""Write files and folders so that they appear under their final name only when they are
complete."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

from lora_cli.common import endings, lock, plain_files, privacy, ui
from lora_cli.common.errors import LoraError, RejectedError, UsageError
from lora_cli.common.plain_files import read_small
from lora_cli.common.shown import quote


def make_cache_folder(folder: Path) -> None:
    """Make a folder in the cache and what is missing above it, open to the user alone. Raises
    OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def remove_unused(folder: Path, sign: str) -> None:
    """Remove entries of a folder in the cache that were not used for DAYS days, by the time of the
    file `sign` in each, and what killed processes left half-made."""
    oldest = time.time() - DAYS * 24 * 3600
    for entry in folder.iterdir():
        used = entry / sign if (entry / sign).is_file() else entry
        try:
            unused = used.stat().st_mtime < oldest
        except FileNotFoundError:  # another process has just renamed or removed it
            continue
        if unused:
            remove(entry)


def find_cache_home() -> Path:
    """Return the program's own folder in the user's cache, whether or not it exists:
    `<cache>/lora-cli`.

    `<cache>` is $LORA_CACHE_DIR, else $XDG_CACHE_HOME, else the platform's own (~/.cache,
    ~/Library/Caches).
    """
    usual = "~/Library/Caches" if platform.system() == "Darwin" else "~/.cache"
    cache = os.environ.get("LORA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or usual
    try:
        return Path(cache).expanduser().resolve() / "lora-cli"
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        raise LoraError(str(error), "set HOME, or LORA_CACHE_DIR to a folder") from None


DAYS = 30
"""How long the cache keeps what is not used."""
MADE_HERE = ("record.json", "lora_record.json", "model.onnx.json")
"""A folder that holds one of these files was made by lora, so a hint may suggest removing it."""
RESULTS = ("adapter", "merged")
"""What results are called in their run's folder, which says nothing of them elsewhere."""
LARGEST = 2**128
"""Whole numbers in JSON are smaller; tokenizers write 10^30 for a length without a limit."""
LEFTOVER = re.compile(r"\.lora-(\d+)-(\d+)-([0-9a-f]{6})-[0-9a-f]{8}\.tmp")
"""What is in the making is called so: process, when it started, host, and a random number."""


def _name_passing(parent: Path) -> Path:
    """Return a name in `parent` that nothing has and nobody can guess, and remove what killed
    processes left there, among the temporary files and in the cache."""
    home = find_cache_home()
    for folder in (parent, Path(tempfile.gettempdir()), home, home / "rows", home / "fetched"):
        remove_leftovers(folder)
    process = os.getpid()
    stamp = f"{process}-{_find_start(process)}-{_name_host()}-{secrets.token_hex(4)}"
    return parent.absolute() / f".lora-{stamp}.tmp"


@cache
def _name_host() -> str:
    """Return what tells this machine from those that share its disks. Containers may share a
    machine's name, but each numbers its own processes."""
    numbering = ""
    with suppress(OSError):  # Linux alone has it
        numbering = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {numbering}".encode()).hexdigest()[:6]


def _find_start(process: int) -> int:
    """Return when a process started, by a clock that nobody sets; -1 where there is none of that
    number."""
    if platform.system() == "Linux":
        try:
            stat = Path(f"/proc/{process}/stat").read_bytes()  # in which its name is no text
        except (FileNotFoundError, ProcessLookupError):
            return -1
        state, *fields = stat.rpartition(b")")[2].split()
        return -1 if state in b"ZX" else int(fields[18])
    import psutil  # 20 ms, which light commands need not spend

    try:
        return int(psutil.Process(process).create_time() * 100)
    except psutil.Error:
        return -1


@cache
def remove_leftovers(parent: Path) -> None:
    """Remove, once, what processes of this machine that were killed had in the making in
    `parent`."""
    with suppress(OSError):  # it is not there, or not ours to read
        for path in list(parent.iterdir()):
            if lock.NAME.fullmatch(path.name):
                lock.remove_leftover(path)
            found = LEFTOVER.fullmatch(path.name)
            if found is None or found[3] != _name_host():
                continue
            if _find_start(int(found[1])) != int(found[2]) and remove(path):
                ui.say(f"removed {path}, which a process that was killed had left")


def remove(path: Path) -> bool:
    """Remove a file, a link or a folder; return whether nothing of that name is left."""
    for _ in range(10):  # a thread or a child that is being ended may have written a last file
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if not os.path.lexists(path):
            return True
    return False


def measure(folder: Path) -> int:
    """Return the bytes of the files in a folder and below it, none for what is no folder; files
    that other processes remove meanwhile are left out."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).lstat().st_size
    return size


@contextmanager
def passing(path: Path) -> Iterator[None]:
    """`path`, a file or folder that the block makes, is gone after it, at whatever instant a signal
    ends the block: it is noted before it is made."""
    with endings.undone(partial(remove, path.absolute())):
        yield


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder of our own in `parent`, or among the system's temporary ones, that goes away
    with all that is in it. Nobody else can look into it.

    Not tempfile's, which names a folder to nobody before it has made it.
    """
    folder = _name_passing(parent or _find_temporary())
    with passing(folder):
        with _refusing_taken(folder):
            folder.mkdir(mode=0o700)
        yield folder


@contextmanager
def _refusing_taken(path: Path) -> Iterator[None]:
    """Say that somebody else has just made `path`, whose name nobody could guess."""
    try:
        yield
    except FileExistsError:
        raise LoraError(f"{path} is another program's", "do it again") from None


def make_passing_folder() -> Path:
    """Make a folder among the system's temporary ones that goes away with the process."""
    folder = _name_passing(_find_temporary())
    endings.undo_with_process(partial(remove, folder))
    with _refusing_taken(folder):
        folder.mkdir(mode=0o700)
    return folder


def _find_temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        hint = "set TMPDIR to a folder that can be written to"
        raise LoraError(str(error.strerror), hint) from None


def _use_temporary(folder: str | None) -> bool:
    """Put back where temporary files were; return True."""
    tempfile.tempdir = None
    os.environ.pop("TMPDIR", None)
    os.environ |= {} if folder is None else {"TMPDIR": folder}
    return True


def keep_temporary_files_together() -> None:
    """Let libraries and children put their temporary files into a folder that goes away with the
    process. What torch compiles stays, beside it."""
    temporary, user = _find_temporary(), getattr(os, "getuid", int)()  # not on Windows
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary / f"torchinductor_{user}"))
    if len(str(temporary)) <= 27:  # the address of a socket in it has at most 104 bytes
        folder, before = make_passing_folder(), os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        endings.undo_with_process(partial(_use_temporary, before))


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, then rename; after a failure `path` is as it was.

    A symbolic link of that name is replaced, not followed.
    """
    staging = _name_passing(path.parent)
    with passing(staging):
        with _refusing_taken(staging), staging.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)


def write_new(path: Path, text: str, otherwise: str) -> None:
    """Write a file that is not there yet, whole or not at all. UsageError, with the hint
    `otherwise`, where something of that name is, and where its folder is none."""
    with staged_file(path, otherwise) as file:
        file.write(text)


def find_free(path: Path) -> Path:
    """Return a path beside one that is taken, which is not: `rows-2.yaml` of `rows.yaml`."""
    names = (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(2))
    return next(each for each in map(path.with_name, names) if not os.path.lexists(each))


@contextmanager
def staged_file(final: Path, otherwise: str) -> Iterator[TextIO]:
    """Yield a file to write to, which gets its name when the block is over, and goes where it
    fails. UsageError, before the block, as by `write_new`."""
    if not final.parent.is_dir():
        raise UsageError(f"{final.parent} is not a folder", f"mkdir -p {quote(final.parent)}")
    with lock.hold(final):
        if os.path.lexists(final):
            raise UsageError(f"{final} already exists", otherwise)
        staging = _name_passing(final.parent)
        with passing(staging):
            with _refusing_taken(staging):
                file = staging.open("x", encoding="utf-8")
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            staging.replace(final)


def leave_out_home(folder: Path) -> None:
    """Replace the user's home folder by ~, and secrets by ***, in the configurations and cards that
    libraries wrote into `folder`."""
    for path in folder.glob("*config.json"):
        data = read_json(path)
        if (portable := privacy.make_portable(data)) != data:
            write_json(path, portable)
    for path in folder.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if (said := privacy.mask_secrets(privacy.replace_home(text))) != text:
            write_text(path, said)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON in `path`, which somebody else may have written; LoraError where it is none,
    or beyond the limits of `parse_json`."""
    return parse_json(read_small(path), path)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; LoraError where it holds anything else, or as by
    `read_json`."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise LoraError(f"{path} is not a mapping", f"copy it again; less {quote(path)} shows it")
    return found


def parse_json(text: str | bytes, source: object) -> Any:
    """Return the value of a JSON text that `source` holds.

    Raise LoraError where it is not valid, for brackets within 200 others, halves of characters, and
    numbers that no machine's type holds.
    """
    from pydantic import TypeAdapter, ValidationError  # 60 ms, which light commands need not spend

    place, said = str(source), "a whole number has too many digits"
    try:
        value = TypeAdapter(Any).validate_json(text)  # its limits: brackets and characters
    except ValidationError as error:
        said, _, where = str(error.errors()[0]["ctx"]["error"]).partition(" at line ")
        place += f":{where.split()[0]}" if where else ""
    else:
        if not _holds_huge_number(value):
            return value
    raise LoraError(f"{place}: not valid JSON: {said}", f"less {quote(source)}")


def _holds_huge_number(value: Any) -> bool:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            waiting += each.values() if isinstance(each, dict) else each
        elif type(each) is int and abs(each) >= LARGEST:
            return True
    return False


@contextmanager
def staged_folder(final: Path, rejected: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `final`; rename it to `final` on success, remove it on failure.

    After a RejectedError it is renamed to `rejected` instead, if that is given. Neither may exist,
    except as an empty folder: LoraError otherwise, before anything is made, and where another
    process is making it.
    """
    names = [final, *([rejected] if rejected else [])]
    _refuse_each(names)
    with (
        made_folder(final.parent, final),
        lock.hold(*names),
        scratch_folder(final.parent.resolve()) as scratch,
    ):
        _refuse_each(names)  # it may have been made just now
        staging = scratch / final.name
        staging.mkdir()
        try:
            yield staging
            _give_name(staging, final)
        except RejectedError:
            if rejected:
                _give_name(staging, rejected)
            raise


def _refuse_each(folders: Iterable[Path]) -> None:
    for folder in folders:
        refuse_occupied(folder)


def _give_name(staging: Path, final: Path) -> None:
    """Rename a folder that is complete; LoraError where something else has taken the name."""
    final, mode = staging.parent.parent / final.name, staging.stat().st_mode & 0o666
    for path in staging.rglob("*"):
        if path.is_file():  # safetensors makes its files for their maker alone
            path.chmod(mode)
    try:
        if os.name == "nt" and final.is_dir():  # elsewhere an empty folder is replaced
            final.rmdir()
        staging.rename(final)
    except (FileExistsError, NotADirectoryError, OSError) as error:
        if not os.path.lexists(final):
            raise
        raise LoraError(
            f"{final} has been made meanwhile: {error.strerror}", "choose another output"
        ) from error


@contextmanager
def scratch_beside(folder: Path, targets: Iterable[Path], *others: Path) -> Iterator[Path]:
    """Make `folder`, in which files `targets` are to be made by nobody else, nor `others`; yield a
    scratch folder in it. LoraError where one of `targets` exists."""
    targets = list(targets)
    with made_folder(folder), lock.hold(*targets, *others), scratch_folder(folder) as scratch:
        refuse_existing(targets)
        yield scratch


def move_together(names: Mapping[Path, Path]) -> None:
    """Give complete files their final names, all of them also where a signal comes amid it."""
    with endings.postponed_signals():
        for made, final in names.items():
            made.replace(final)


def refuse_existing(targets: Iterable[Path]) -> None:
    """Raise LoraError for the first of these files that exists."""
    for target in targets:
        if target.exists() or target.is_symlink():
            raise LoraError(f"{target} already exists", f"rm {quote(target)}")


def name_artefact(folder: Path) -> str:
    """Return the stem for files made from the result in `folder`: its name, or its run's name where
    the folder's says nothing (`adapter`, `merged`)."""
    name = folder.resolve().name
    return name if name not in RESULTS else folder.resolve().parent.name


@contextmanager
def made_folder(folder: Path, final: Path | None = None) -> Iterator[None]:
    """Make `folder` and its parents; those of them that are empty after the block go again.

    LoraError where one cannot be made; it names `final` if that is given: what `folder` is for.
    """
    folder = folder.absolute()
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    with endings.undone(partial(_remove_empty, missing)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            named, is_file = final or folder, isinstance(error, FileExistsError)
            said = os.strerror(errno.ENOTDIR) if is_file else error.strerror
            there = plain_files.find_existing(named.parent)
            raise LoraError(f"{named} cannot be made: {said}", f"ls -ld {quote(there)}") from error
        yield


def _remove_empty(folders: Iterable[Path]) -> bool:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
    return True


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
