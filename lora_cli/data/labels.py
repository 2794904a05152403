"""Find which labels rows have, before a model is made that tells them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_cli.common import LoraError, spell_count
from lora_cli.data import formats, prepare, readers, sources
from lora_cli.data.classify import NUMBERS, SEVERAL, name_label, read_number, read_several
from lora_cli.data.encoders import Encoder
from lora_cli.data.formats import BadRow
from lora_cli.recipe import Recipe

ONE = "single_label_classification"
WHOLE = re.compile(r"-?[0-9]{1,18}")
"""A number by which labels are sorted; of other signs that are digits to Python, as ², none is
made."""
MOST = 10_000
"""Labels from which they are taken for texts or measurements."""


class Found(NamedTuple):
    """What the rows' labels are, and of which kind."""

    labels: list[str]
    problem_type: str


def find_labels(recipe: Recipe, encoder: type[Encoder]) -> Found:
    """Return the labels of the rows that a recipe trains on, sorted: numbers as such, tags by what
    they mark; and whether a row has one, several, or a measured value. Raises LoraError where they
    cannot be told apart."""
    problem: Any = recipe.model.problem_type
    by_token = encoder.by_token
    counted: Counter[str] = Counter()
    widths: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for value in _walk_values(recipe, encoder):
        kind = problem if problem != "auto" else ONE if by_token else _tell_kind(value)
        kinds[kind] += 1
        try:
            if kind == NUMBERS:
                widths[len(value) if isinstance(value, list) else 1] += 1
            elif by_token or kind == SEVERAL:
                counted.update(name_label(each) for each in read_several(value))
            else:
                counted[name_label(value)] += 1
        except BadRow:  # encoding says which row it is
            continue
        if len(counted) > MOST:
            raise LoraError(
                f"data.path: there are over {MOST:,} different labels",
                "name the column with labels: --set data.columns={label: NAME}, or, where they are "
                "measured values, --set model.problem_type=regression",
            )
    kind = _choose_kind(recipe, kinds, counted)
    declared = _find_declared(recipe, encoder)
    if kind != NUMBERS and counted and declared and counted.keys() <= set(declared):
        return Found(declared, kind)
    if kind == NUMBERS:
        count = max(widths, key=lambda width: widths[width], default=1)
        return Found(["value"] if count == 1 else [f"value_{at + 1}" for at in range(count)], kind)
    if len(counted) < 2 and kind == ONE and recipe.model.labels == "auto":
        only = f"only the label {next(iter(counted))}" if counted else "no labels"
        raise LoraError(
            f"data.path: the rows have {only}", "a model tells two or more apart: mend the data"
        )
    return Found(sorted(counted, key=_order), kind)


def _find_declared(recipe: Recipe, encoder: type[Encoder]) -> list[str]:
    """Return the classes that the data's tables name beside their rows, in their order; none where
    they do not, or differ."""
    column = "tags" if encoder.by_token else "label"
    found: list[list[str]] = []
    for data, field, path in _list_parts(recipe):
        source = sources.find_source(data, field, path, data.split)
        declared = source.read_class_names()
        theirs = data.columns.get(column, column)
        if theirs not in declared and len(declared) == 1:
            theirs = next(iter(declared))
        found.append(declared.get(theirs, []))
    return found[0] if found and all(each == found[0] for each in found) else []


def _tell_kind(value: Any) -> str:
    """Return what kind of label a value is."""
    if isinstance(value, list):
        measured = value and all(isinstance(each, float) for each in value)
        return NUMBERS if measured else SEVERAL
    if isinstance(value, float) and not value.is_integer():
        return NUMBERS
    if isinstance(value, str) and "." in value:
        try:
            return NUMBERS if not read_number(value).is_integer() else ONE
        except BadRow:
            return ONE
    return ONE


def _choose_kind(recipe: Recipe, kinds: Counter[str], counted: Counter[str]) -> str:
    """Return the kind of all labels; LoraError where they are of several that do not fit."""
    if kinds[NUMBERS] and not kinds[SEVERAL]:  # of numbers some are whole
        numeric = all(_is_number(name) for name in counted)
        if not numeric:
            raise LoraError(
                f"data.path: of the labels {kinds[NUMBERS]:,} are numbers with a fraction, and "
                f"others are names, such as {next(n for n in counted if not _is_number(n))!r}",
                "--set model.problem_type=single_label_classification, or regression",
            )
        return NUMBERS
    if kinds[SEVERAL] and kinds[ONE]:
        raise LoraError(
            f"data.path: {spell_count(format(kinds[SEVERAL], ','), 'row has', 'rows have')} a "
            "list of labels, "
            f"and {kinds[ONE]:,} one",
            "give each row a list, or none",
        )
    return next(iter(kinds), ONE)


def _is_number(name: str) -> bool:
    try:
        read_number(name)
    except BadRow:
        return False
    return True


def _order(name: str) -> tuple[Any, ...]:
    """Return what labels are sorted by: `O` first, then what tags mark, numbers by their size."""
    if name == "O":
        return (0,)
    if WHOLE.fullmatch(name):
        return (1, int(name), name)
    marked = name[2:] if name[:2] in ("B-", "I-") else name
    return (2, marked, name)


def _walk_values(recipe: Recipe, encoder: type[Encoder]) -> Iterator[Any]:
    """Yield the label, or the tags, of each row that is trained on and can be read."""
    column = "tags" if encoder.by_token else "label"
    for data, field, path in _list_parts(recipe):
        source = sources.find_source(data, field, path, data.split)
        opened = prepare.open_rows(source, data, encoder, quiet=True)
        for _, row in opened.rows:
            value = _read_value(row, opened.names, column)
            if value is not None:
                yield value


def _read_value(row: readers.Row, columns: Any, column: str) -> Any:
    if isinstance(row, BadRow):
        return None
    return formats.rename_columns(row, columns).get(column) if columns else row.get(column)


def _list_parts(recipe: Recipe) -> Iterator[tuple[Any, str, Any]]:
    """Yield the data sets of a recipe, each as `data:` would name it alone."""
    data = recipe.data
    if not data.mix:
        yield data, "path", data.path
        return
    for number, rows in enumerate(data.mix):
        own = data.model_copy(update={**dict(rows), "mix": None})
        yield own, f"mix.{number}.path", rows.path
