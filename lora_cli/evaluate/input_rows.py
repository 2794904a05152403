"""Read rows to answer: from what `data.path` takes, standard input or the command line, with their
columns told as in training."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lora_cli.common import LoraError, UsageError, find_nearest, library_errors, quote, ui
from lora_cli.data import formats, picture_folder, prepare, readers, sources, tables
from lora_cli.evaluate.predictors import Asked, Predictor
from lora_cli.recipe import Column, Data

STDIN = "-"
SPLIT = "train"
"""Of what has several, this one is read."""
OPTIONS = {
    "data.path: ": "--data ",
    "data.split: ": "--data ",
    "--set data.path=": "--data ",
    "check data.path and data.split": "name a file of rows",
    "--set data.on_bad_row=skip": "--on-bad-row skip",
    "add it to model.labels, or mend the row": "mend the row, or --no-labels",
    "keep the pictures in the table, or read the table from its file": (
        "--data with a file of such rows in the folder of the pictures"
    ),
}
"""What is said of a recipe's keys, and what this verb has in their place."""
MEND = "mend or remove the row, or --on-bad-row skip"


class Rows(NamedTuple):
    """Rows with their places, their format and the names of their columns, as ours: theirs."""

    rows: Iterator[tuple[str, readers.Row]]
    style: str
    columns: Mapping[str, str]
    is_piped: bool
    """Whether they come one by one, and answers are waited for."""

    def convert(self, place: str, row: readers.Row) -> Asked | formats.BadRow:
        """Return a row under our names of columns, or why there is none."""
        if isinstance(row, formats.BadRow):
            return row
        return Asked(self.style, formats.rename_columns(row, self.columns), place)


class Wanted(NamedTuple):
    """Which rows are to be read, and what is known of their columns."""

    data: str | None
    texts: Sequence[str]
    columns: Mapping[str, str]
    """Those that the command line names, as ours: theirs."""
    keep: Sequence[str]
    """Columns that are to stand beside the answers."""


def open_rows(wanted: Wanted, trained: Mapping[str, str], predictor: type[Predictor]) -> Rows:
    """Return the rows to be answered by a predictor; `trained` are the names of columns, as ours:
    theirs, that training was told of. Raises LoraError where there are none, or their
    columns are not those of its task."""
    files: list[Any] = []
    if wanted.data is None:
        rows = _number_texts(wanted.texts, predictor)
    elif wanted.data == STDIN:
        rows = readers.read_lines(sys.stdin.buffer, "stdin")
    else:
        source = find_source(wanted.data, wanted.columns or trained)
        say_split(Path(wanted.data), source)
        rows, files = source.read_rows(), source.files
    piped = wanted.data == STDIN
    first = _read_first(rows, 1 if piped else prepare.COLUMNS_FROM)
    if not first:
        raise LoraError(f"{wanted.data} holds no rows", "write a row on each line")
    readable = [row for _, row in first if not isinstance(row, formats.BadRow)]
    columns = formats.list_columns(readable)
    if readable:
        _refuse_missing("--column", [*wanted.columns.values()], columns, [*wanted.columns])
        whole = {name for row in readable for name in row}
        _refuse_missing("--keep", [name for name in wanted.keep if name not in whole], columns)
        try:
            style, names = choose_columns(wanted.columns, trained, columns, predictor)
        except prepare.UnknownColumns as error:
            if lack := tables.find_lack_of_names(files, columns):
                raise LoraError(lack.message, "write a line of names above the rows") from None
            raise error
    else:
        style, names = next(iter(predictor.layouts[0].formats)), {}
    return Rows(chain(first, rows), style, names, piped)


def _number_texts(
    texts: Sequence[str], predictor: type[Predictor]
) -> Iterator[tuple[str, readers.Row]]:
    """Return texts as rows; raises UsageError where the predictor reads none."""
    taken = list(predictor.layouts[-1].formats.values())
    if ("text",) not in taken:
        read = " or ".join(", ".join(names) for names in taken)
        said = f"--text: a text is not what the model reads: that is {read}"
        raise UsageError(said, "--data with a file or a folder in its place")
    return ((f"text {number}", {"text": text}) for number, text in enumerate(texts, 1))


def find_source(data: str, columns: Mapping[str, str]) -> sources.Source:
    """Return where rows come from, whose columns are named as ours: theirs; errors speak of
    --data."""
    try:
        readers.refuse_missing_files(Data(path=data))
        named = Data(path=data).model_copy(update={"columns": dict(columns)})
        return sources.find_source(named, "path", data, SPLIT)
    except Exception as error:
        known = error if isinstance(error, LoraError) else library_errors.translate(error)
        if known is None:
            raise
        said, hint = known.message, known.hint or ""
        for of_recipe, ours in OPTIONS.items():
            said, hint = said.replace(of_recipe, ours), hint.replace(of_recipe, ours)
        hint = re.sub(r"(--data )\[(.+)\]$", r"\1\2", hint)  # a recipe's list of files
        part = Path(data, hint.removeprefix("split: "))
        if hint.startswith("split: ") and part.exists():
            hint = f"--data {quote(part)}"
        raise LoraError(said, hint or None, known.details) from error


def say_split(place: Path, source: sources.Source) -> None:
    """Say which of the splits in a folder, or of a data set, is read, where there are several."""
    splits = picture_folder.list_splits(place) if place.is_dir() else []
    if source.table is not None:
        splits = splits or list(source.table.info.splits or [])
    if others := [name for name in splits if name != SPLIT]:
        part = place / others[0]
        instead = f": --data {quote(part)}" if part.exists() else ""
        ui.say(f"{place}: of its splits {SPLIT} is read, and not {', '.join(others)}{instead}")


def _read_first(
    rows: Iterator[tuple[str, readers.Row]], count: int
) -> list[tuple[str, readers.Row]]:
    """Return rows up to that of which so many can be read."""
    first: list[tuple[str, readers.Row]] = []
    readable = 0
    for each in islice(rows, prepare.LOOKED_AT):
        first.append(each)
        readable += not isinstance(each[1], formats.BadRow)
        if readable == count:
            break
    return first


def _refuse_missing(
    option: str, named: Sequence[str], columns: Sequence[str], ours: Sequence[str] = ()
) -> None:
    """Raise UsageError for a column that an option names, as one of `ours` where there are any, and
    the rows lack."""
    before = [f"{name}=" for name in ours] or [""] * len(named)
    for each, name in zip(before, named):
        if not formats.is_column(name, columns):
            guess = find_nearest(name, columns)
            raise UsageError(
                f"{option} {each}{name}: there is no column {name}; there are "
                f"{', '.join(columns[: prepare.SHOWN])}",
                f"{option} {quote(f'{each}{guess or columns[0]}')}",
            )


def choose_columns(
    given: Mapping[str, str],
    trained: Mapping[str, str],
    columns: Sequence[str],
    predictor: type[Predictor],
) -> tuple[str, Mapping[str, str]]:
    """Return the format of rows with these columns, and the names of these, as ours: theirs: as the
    command line says, else as in training, else as they are known. Raises UnknownColumns."""
    there = {ours: theirs for ours, theirs in trained.items() if formats.is_column(theirs, columns)}
    known = [formats.guess_columns(columns, *layout) for layout in predictor.layouts]
    for names in [given] if given else [*filter(None, [there]), *known]:
        named = formats.name_columns(columns, names)
        for layout in predictor.layouts:
            if style := formats.recognise_format(named, layout.formats):
                _say_names(names)
                return style, names
    asked = [each for layout in predictor.layouts[1:] for each in layout.formats.values()]
    named = [name for name in columns if name not in given.values()]
    options = [f"{ours}={theirs}" for ours, theirs in zip(asked[-1], named or columns)]
    more = f" and {len(columns) - prepare.SHOWN} more" if len(columns) > prepare.SHOWN else ""
    raise prepare.UnknownColumns(
        f"the columns are {', '.join(columns[: prepare.SHOWN])}{more}, and rows need "
        f"{' or '.join(', '.join(each) for each in asked)}",
        " ".join(f"--column {quote(option)}" for option in options),
    )


def _say_names(names: Mapping[str, str]) -> None:
    read = [f"{theirs} as {ours}" for ours, theirs in names.items() if ours != theirs]
    if read:
        ui.say(f"columns: {', '.join(read)}")


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Return what `--column OURS=THEIRS` says. Raises UsageError for a name that is not ours."""
    found = {}
    for each in given:
        ours, sign, theirs = each.partition("=")
        if not (sign and theirs):
            raise UsageError(f"--column {each} is not OURS=THEIRS", "--column text=NAME")
        if ours not in get_args(Column):
            guess = find_nearest(ours, get_args(Column)) or "text"
            raise UsageError(
                f"--column {each}: {ours} is none of our columns",
                f"--column {quote(f'{guess}={theirs}')}",
            )
        found[ours] = theirs
    return found


def suggest(bad: formats.BadRow) -> str:
    """Return what mends a row, in options of this verb."""
    hint = bad.hint
    for of_recipe, ours in OPTIONS.items():
        hint = hint.replace(of_recipe, ours)
    return MEND if "--set" in hint else hint
