"""Find the pictures of a folder that has a folder for each label: photos/cat/1.png.

There may be folders of such for each split: photos/train/cat/1.png.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from lora_cli.common import LoraError, find_nearest, quote, spell_count, ui
from lora_cli.data import pictures, readers
from lora_cli.recipe import Recipe

SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
"""What folders are called that are no labels."""


def refuse_pictures(recipe: Recipe) -> None:
    """Raise LoraError for pictures where the recipe's task reads texts."""
    if recipe.task_row.reads_pictures:
        return
    for field, name in readers.list_named(recipe.data):
        path = Path(name)
        if pictures.is_picture(path) or (path.is_dir() and has_pictures(field, path)):
            what = "a folder of pictures" if path.is_dir() else "a picture"
            raise LoraError(
                f"data.{field}: {name} is {what}, and models that {recipe.task_row.does} read none",
                "task: image_classification, or name files of rows",
            )


def has_pictures(field: str, folder: Path) -> bool:
    """Return whether a folder is one of pictures: there are more of them than tables. Raises
    LoraError where one of these says what they are."""
    kinds = [(path, readers.guess_kind(path)) for path in _walk(folder)]
    found = [path for path, kind in kinds if kind == "picture"]
    tables = [path for path, kind in kinds if kind not in (None, "picture")]
    if len(found) <= len(tables):
        return False
    if told := [path for path in tables if path.stem == "metadata"]:
        raise LoraError(
            f"data.{field}: {folder} has pictures and a table of them, {told[0]}",
            f"--set data.{field}={quote(told[0])}",
        )
    return True


def find_pictures(field: str, folder: Path, split: str) -> tuple[list[Path], str]:
    """Return the pictures of a folder, or of the folder in it that is called as the split is, and
    what is left of the split: `train[:90%]` of `test[:90%]`.

    Raises LoraError for pictures that lie in no label's folder, or deeper.
    """
    root, rest = _choose_split(field, folder, split)
    found, others = list[Path](), list[Path]()
    for path in _walk(root):
        if not pictures.is_picture(path):
            others.append(path)
            continue
        deep = len(path.relative_to(root).parts)
        if deep != 2:
            where = "in no label's folder" if deep == 1 else "deeper than in a label's folder"
            raise LoraError(
                f"data.{field}: {path} lies {where}",
                f"a label's pictures lie in its folder: {root.name}/LABEL/{path.name}",
            )
        found.append(path)
    if not found:
        raise LoraError(
            f"data.{field}: {root} has no pictures ({', '.join(pictures.ENDINGS)})",
            f"ls {quote(root)}",
        )
    _say_left_out(root, tuple(others))
    _say_empty(root, frozenset(path.parent for path in found))
    return found, rest


def list_splits(folder: Path) -> list[str]:
    """Return the folders in a folder, if all are called as splits are."""
    there = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    splits = [name for name in there if name.lower() in SPLITS]
    others = [name for name in there if name not in splits and not name.startswith(".")]
    return [] if others else splits


def mix(files: Sequence[Path]) -> list[Path]:
    """Return pictures in an order of no meaning, but always the same: any part of them, such as
    train[:90%], has pictures of each folder."""

    def draw(file: Path) -> bytes:
        name = "/".join(file.parts[-2:])
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    return sorted(files, key=draw)


def _choose_split(field: str, folder: Path, split: str) -> tuple[Path, str]:
    """Return the folder of a split's labels, and the split in it."""
    splits = list_splits(folder)
    if not splits:
        return folder, split
    name = re.split(r"[\[+]", split)[0].strip()
    if name not in splits:
        guess = find_nearest(name, splits) or splits[0]
        raise LoraError(
            f"data.{field.replace('path', 'split')}: {folder} has no split {name!r}; it has "
            f"{', '.join(splits)}",
            f"split: {guess}",
        )
    return folder / name, re.sub(rf"(^|\+)\s*{re.escape(name)}", r"\1train", split)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files of a folder that are not hidden, in order."""
    for path in sorted(root.rglob("*")):
        if not _is_hidden(root, path) and path.is_file():
            yield path


def _is_hidden(root: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


@cache
def _say_left_out(root: Path, others: tuple[Path, ...]) -> None:
    if others:
        ui.warn(
            f"{spell_count(len(others), 'file')} of {root} {'is' if len(others) == 1 else 'are'} "
            f"left out, by their names no pictures that are read, such as {others[0]}"
        )


@cache
def _say_empty(root: Path, filled: frozenset[Path]) -> None:
    empty = [
        path.name
        for path in sorted(root.iterdir())
        if path.is_dir() and path not in filled and not path.name.startswith(".")
    ]
    if empty:
        ui.warn(f"{root}: no pictures in {', '.join(empty)}: no label is called so")
