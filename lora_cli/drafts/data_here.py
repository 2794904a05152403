"""Which files of rows lie in a folder, and which of them stands beside another to evaluate on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_cli.common import LoraError, UsageError, find_nearest, quote
from lora_cli.data import readers, sources
from lora_cli.drafts.questions import Questions

SHOWN = 6
EVALUATED = ("validation", "valid", "val", "dev", "eval", "test")
"""What the file beside one of `train` is called, which is never trained on."""
FOLDER = Path()
"""The current one."""


def find_data(given: str | None, questions: Questions) -> str:
    """Return the rows that are meant: those that are `given`, or a file of the current folder.

    Raises LoraError where there is no such file, UsageError where one is to be chosen and nobody is
    asked.
    """
    there = _list_files(FOLDER)
    if given is not None:
        _refuse_missing(given, there)
        return given
    if not there:
        raise LoraError(
            f"no file of rows lies here ({', '.join(readers.TABLES)})",
            "lora init FILE names one that lies elsewhere, or a data set on the hub",
        )
    if len(there) == 1:
        return there[0]
    if not questions.asks:
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        raise UsageError(
            f"{len(there)} files of rows lie here: {', '.join(there[:SHOWN])}{more}",
            f"lora init {quote(there[0])}",
        )
    return questions.choose("which rows", there, there[0])


def find_evaluation(path: str) -> str | None:
    """Return the file beside rows to train on that has those to evaluate on, by its name:
    `gsm8k_test.jsonl` of `gsm8k_train.jsonl`."""
    file = Path(path)
    if not file.is_file() or not (found := re.search(r"(?<![a-z])train(?![a-z])", file.name)):
        return None
    others = (file.name[: found.start()] + name + file.name[found.end() :] for name in EVALUATED)
    beside = (file.with_name(other) for other in others)
    return next((str(each) for each in beside if each.is_file()), None)


def _list_files(folder: Path) -> list[str]:
    """Return the names of the files of rows in a folder; those to train on come first."""
    found = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix.lower() and not path.name.startswith(".") and path.is_file()
    ]
    kinds = {name: readers.guess_kind(Path(name)) for name in found}
    rows = [name for name, kind in kinds.items() if kind not in (None, "picture")]
    return sorted(rows, key=lambda name: "train" not in name)


def _refuse_missing(given: str, there: Sequence[str]) -> None:
    """Raise LoraError for a file that is not there or is none of rows, or a folder without one."""
    path = Path(given)
    if sources.is_elsewhere(given):
        return
    if path.is_dir():
        if not any(readers.guess_kind(file) for file in path.rglob("*")):
            kinds = ", ".join(readers.TABLES)
            raise LoraError(f"{given} holds no file of rows ({kinds})", f"ls {quote(path)}")
        return
    if path.is_file():
        if readers.guess_kind(path) is None:
            raise readers.unknown_kind("path", path)
        return
    if readers.guess_kind(path) is not None:
        guess = find_nearest(given, there)
        hint = f"lora init {quote(guess)}" if guess else f"ls {quote(path.parent)}"
        raise LoraError(f"{given} does not exist", hint)
