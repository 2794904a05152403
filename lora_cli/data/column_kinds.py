"""What is in the columns of rows that match no format: which have texts, so that no number, switch
or mapping is offered as a prompt or an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data import formats
from lora_cli.data.encoders import Encoder

KINDS = {
    bool: "true or false",
    int: "numbers",
    float: "numbers",
    list: "lists",
    dict: "mappings",
    bytes: "bytes",
}
NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d\s*(?:%\s*)?")
TEXTS, OTHERS = {"text", "source", "chosen"}, {"label", "labels", "answers", "tags", "image"}
"""Columns by which formats are told that have texts alone."""


def tell_kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the columns of rows have in words, such as `numbers`, also where a table has them
    as texts; nothing of one with texts. Places inside of columns are as they are listed."""
    found: dict[str, str] = {}
    for name in formats.list_columns(rows):
        values = [value for row in rows if (value := _read(row, name)) not in (None, "")]
        kinds = {_tell_kind(value) for value in values}
        found[name] = kinds.pop() if len(kinds) == 1 else "several kinds" if kinds else "nothing"
    return found


def _read(row: Mapping[str, Any], name: str) -> Any:
    return formats.rename_columns(row, {"text": name}).get("text")


def _tell_kind(value: Any) -> str:
    if isinstance(value, str):
        return "numbers" if NUMBER.fullmatch(value) else ""
    return KINDS.get(type(value), type(value).__name__)


def describe(columns: Sequence[str], kinds: Mapping[str, str]) -> str:
    """Return the columns with what those have that are not of texts: `id (numbers), title`."""
    return ", ".join(f"{name} ({kinds[name]})" if kinds.get(name) else name for name in columns)


def suggest(
    columns: list[str],
    kinds: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    encoder: Encoder | type[Encoder],
) -> str:
    """Return the option that names columns which may be what a task reads: inside of a column where
    a format stands there; of tasks that read texts alone, no others. Or the objective that is for
    rows of these columns."""
    if objective := _find_objective(columns, kinds, encoder.row_formats):
        return f"--set objective={objective}"
    if inside := _find_inside(rows, encoder):
        return formats.suggest_columns(**inside)
    texts = [name for name in columns if not kinds.get(name)]
    needed = {each for names in encoder.row_formats.values() for each in names}
    if needed & TEXTS and not needed & OTHERS:
        if not texts:
            return "add a column of texts, from which a model can learn: these have none"
        columns = texts
    one_is_read = "completion" in needed or {"text", "label"} <= needed
    return encoder.suggest_columns(put_longest_first(columns, rows) if one_is_read else columns)


def put_longest_first(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns with the longest texts' first, which is rather what is asked than a date
    or a subject is; the last one, which is rather the answer, stays where it is."""
    before = columns[:-1]
    if not before:
        return list(columns)
    lengths = {name: sum(len(str(_read(row, name) or "")) for row in rows) for name in before}
    longest = max(before, key=lambda name: lengths[name])
    return [longest, *(name for name in columns if name != longest)]


def _find_objective(
    columns: Sequence[str], kinds: Mapping[str, str], known: formats.Formats
) -> str | None:
    """Return the objective for pairs of answers where these are asked for single ones, and the
    other way round."""
    if "unpaired" in known and {*formats.ANSWERS} <= {*columns}:
        return "dpo"
    labelled = any(kinds.get(name) == KINDS[bool] for name in ("label", "kto_tag"))
    return "kto" if "preference" in known and labelled else None


def _find_inside(
    rows: Sequence[Mapping[str, Any]], encoder: Encoder | type[Encoder]
) -> dict[str, str]:
    """Return what a format reads, where all of it stands inside of one column of mappings."""
    known = encoder.row_formats
    for name in formats.list_columns(rows):
        inner = formats.list_columns([row[name] for row in rows if isinstance(row.get(name), dict)])
        names = formats.guess_columns(inner, known, encoder.column_sets)
        style = formats.recognise_format(formats.name_columns(inner, names), known)
        if style:
            ours = [*known[style], *(each for each in names if each not in known[style])]
            return {each: f"{name}.{names.get(each, each)}" for each in ours}
    return {}
