"""Files and folders that appear under their final name only when they are whole."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError, RejectedError


def cache_home() -> Path:
    """The program's own folder among the user's caches, present or not: `<cache>/lora-cli`.

    `<cache>` is $LORA_CACHE_DIR, else $XDG_CACHE_HOME, else the platform's own (~/.cache, ~/Library/Caches).
    """
    usual = "~/Library/Caches" if platform.system() == "Darwin" else "~/.cache"
    cache = os.environ.get("LORA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or usual
    return Path(cache).expanduser().resolve() / "lora-cli"


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, rename; after a failure `path` is as it was."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; LoraError naming the line where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraError(f"{path} does not exist", f"ls {path.parent}") from None
    except json.JSONDecodeError as error:
        raise LoraError(f"{path}:{error.lineno}: not valid JSON: {error.msg}", f"less {path}") from None


@contextmanager
def staged_folder(final: Path, rejected: Path | None = None) -> Iterator[Path]:
    """An empty folder beside `final` that is renamed to it on success and removed on failure.

    After a RejectedError it is renamed to `rejected`, where that is given. Both must not exist, or be empty folders:
    LoraError otherwise, before anything is made.
    """
    for folder in [final, *([rejected] if rejected else [])]:
        refuse_occupied(folder)
    staging = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        yield staging
        if final.exists():
            final.rmdir()
        staging.rename(final)
    except RejectedError:
        if rejected:
            staging.rename(rejected)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(targets: Iterable[Path]) -> None:
    """LoraError for the first of these files that exists."""
    for target in targets:
        if target.exists() or target.is_symlink():
            raise LoraError(f"{target} already exists", f"rm {target}")


def stem(folder: Path) -> str:
    """What files made from the result in `folder` are called: its name, or its run's where that says nothing."""
    name = folder.resolve().name
    return name if name not in ("adapter", "merged") else folder.resolve().parent.name


def refuse_occupied(folder: Path) -> None:
    """LoraError if `folder` exists and is anything but an empty folder, or holds the current one."""
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise LoraError(f"{folder} is the current folder or above it", "give a folder that does not exist yet")
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise LoraError(f"{folder} already exists", f"choose another output, or remove it: rm -r {folder}")
