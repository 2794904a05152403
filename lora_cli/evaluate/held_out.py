"""Read the rows that models are scored on: any that `lora train` reads, and prompts alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import LoraError, UsageError, quote, spell_count, ui
from lora_cli.data import formats, sources, unpaired
from lora_cli.evaluate import compared_rows
from lora_cli.evaluate.generate import Question, make_question
from lora_cli.evaluate.input_rows import find_source, say_split
from lora_cli.recipe import DEFAULT_OBJECTIVE, Objective

MEND = "mend or remove the row, or --on-bad-row skip"
LOSS_ONLY = ("text", "tokens")
"""Formats of rows that ask nothing."""


class HeldRow(NamedTuple):
    """A row: its number from 1, where it stands, its columns under our names, and its format."""

    number: int
    place: str
    row: dict[str, Any]
    style: str
    question: Question | None
    """What is asked; None of a text, which asks nothing."""

    @property
    def expected(self) -> str | None:
        """The answer that is expected."""
        return self.question.expected if self.question else None

    @property
    def has_answer(self) -> bool:
        """Whether it holds something that a model learns to write."""
        if self.question is None or self.expected is not None:
            return True
        told = self.style in ("messages", "sharegpt")  # else a text, or "?" where there is none
        return told or not isinstance(self.row.get("completion", ""), str)


class Bad(NamedTuple):
    """A row that no model is scored on, and why."""

    place: str
    said: str
    hint: str


class HeldOut(NamedTuple):
    """The rows of a file, a folder or a data set, and what names them to others."""

    name: str
    """Of a file no more than its name."""
    sha256: str
    key: str
    """A hash of their content and of how it is read: by which names of columns, and of rows that
    say which answers are better, whether these alone."""
    rows: list[HeldRow]
    bad: list[Bad]

    @property
    def expected(self) -> list[str]:
        """The answers that are expected, of the rows that have one."""
        return [row.expected for row in self.rows if row.expected is not None]


def read_held_out(
    data: str,
    given: Mapping[str, str],
    trained: Mapping[str, str],
    max_rows: int | None,
    objective: Objective = DEFAULT_OBJECTIVE,
) -> HeldOut:
    """Read rows, their columns named as on the command line (`given`, ours: theirs), as in
    training, or as they are known; of those that say which answers are better, for a model of such
    an `objective`, these. Raises LoraError where there are none."""
    source = find_source(data, given or trained)
    say_split(Path(data), source)
    read = list(islice(source.read_rows(), max_rows))
    if not read:
        raise LoraError(f"{data} holds no rows", "write a row on each line")
    columns = formats.list_columns(row for _, row in read if isinstance(row, dict))
    for ours, theirs in given.items():
        if not formats.is_column(theirs, columns):
            raise UsageError(
                f"--column {ours}={theirs}: there is no column {theirs}; there are "
                f"{', '.join(columns[:20])}",
                f"--column {quote(f'{ours}={columns[0]}')}" if columns else None,
            )
    there = {ours: name for ours, name in trained.items() if formats.is_column(name, columns)}
    return list_held(Path(data).name, _hash(source), read, given or there, objective)


def list_held(
    name: str,
    sha256: str,
    read: Sequence[tuple[Any, Any]],
    names: Mapping[str, str],
    objective: Objective,
) -> HeldOut:
    """Return rows that were read, with their places, as models are scored on them; `names` are
    those of their columns, as ours: theirs. Of rows that say which answers are better, for a model
    of such an `objective`, these."""
    rows, bad = [], []
    said = [sha256, sorted(names.items()), objective.compares, objective.unpaired]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    if objective.compares:
        read, names = compared_rows.take_better(read, objective, names), {}
    for number, (place, row) in enumerate(read, 1):
        made = _make_row(number, str(place), row, names)
        if isinstance(made, Bad):
            bad.append(made)
        else:
            rows.append(made)
    _warn_of_unwanted(rows)
    return HeldOut(name, sha256, key, rows, bad)


def _warn_of_unwanted(rows: Sequence[HeldRow]) -> None:
    """Warn of answers that are expected though a label says that they are not wanted."""
    unwanted = [
        row.number
        for row in rows
        if row.question and row.has_answer and unpaired.read_label(row.row) is False
    ]
    if unwanted:
        ui.warn(
            f"label is false in {len(unwanted)} of {spell_count(len(rows), 'row')}, whose answers "
            f"count as expected all the same: {list_numbers(rows, unwanted)}"
        )


def _make_row(number: int, place: str, row: Any, names: Mapping[str, str]) -> HeldRow | Bad:
    try:
        if isinstance(row, formats.BadRow):
            raise row
        row = formats.rename_columns(row, names) if names else row
        style = formats.recognise_format(row)
        if style in LOSS_ONLY:
            return HeldRow(number, place, row, str(style), None)
        question = make_question(place, row)
        return HeldRow(number, place, question.row, question.style, question)
    except formats.BadRow as bad:
        return Bad(place, bad.said, MEND)
    except UsageError as error:
        return Bad(place, error.message.removeprefix(f"{place}: "), error.hint or MEND)


def refuse_bad(held: HeldOut, skips_bad: bool) -> None:
    """Raise LoraError for the first row that no model can be scored on, unless such are skipped;
    then say how many there are."""
    if not held.bad:
        return
    place, said, hint = held.bad[0]
    if not skips_bad:
        raise LoraError(f"{place}: {said}", MEND if "--set" in hint else hint)
    total = len(held.rows) + len(held.bad)
    are = "is" if len(held.bad) == 1 else "are"
    ui.warn(
        f"{spell_count(len(held.bad), 'bad row')} of {total} {are} left out; the first is {place}: "
        f"{said}"
    )
    if not held.rows:
        raise LoraError("no row is left to score", "mend the rows")


def _hash(source: sources.Source) -> str:
    """Return a file's SHA-256, as `sha256sum` has it; of several files, or a table, a hash of what
    is read."""
    if len(source.files) != 1:
        return source.hash_content()
    with source.files[0].open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shorten_place(place: str, data: str) -> str:
    """Return where a row stands without the folder that its file is in."""
    folder = str(Path(data).parent)
    return place.removeprefix(f"{folder}/") if folder != "." else place


def list_numbers(rows: Sequence[HeldRow], wanted: Sequence[int]) -> str:
    """Return where some rows stand, such as `rows.jsonl:3, rows.jsonl:9 and 4 more`."""
    asked = set(wanted)
    places = [row.place for row in rows if row.number in asked]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
