"""Which columns of rows are read, and as what: found, or asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.common import ui
from lora_cli.data import (
    column_kinds,
    encoders,
    formats,
    load,
    preferences,
    prepare,
    sources,
    tables,
    unpaired,
)
from lora_cli.drafts.draft import Draft
from lora_cli.drafts.questions import Questions
from lora_cli.recipe import Data

EXTRA = ("input", "system", "tools", "labels", "text_pair")
"""Columns that a format reads where they are there."""


class Chosen(NamedTuple):
    """The format of rows, and their columns."""

    style: str
    names: dict[str, str]
    """Ours, theirs."""
    unread: list[str]
    first: Sequence[Mapping[str, Any]]


def settle_columns(
    draft: Draft,
    source: sources.Source,
    first: Sequence[Mapping[str, Any]],
    questions: Questions,
) -> Chosen:
    """Put the format of the rows and their columns into the draft. Raises LoraError where the
    columns match no format, and nobody says what they are."""
    there = formats.list_columns(first)
    try:
        chosen = _choose(draft, there, first)
    except prepare.UnknownColumns as error:
        if nameless := tables.find_lack_of_names(source.files, there):
            raise nameless from None
        kinds = column_kinds.tell_kinds(first)
        texts = [name for name in there if not kinds[name]]
        if not (texts and questions.asks and draft.build().task_row.writes_next_tokens):
            raise
        ui.say(f"the columns {column_kinds.describe(there, kinds)} match no known format")
        answer = questions.choose("which has the answers to learn", texts, texts[-1])
        others = [name for name in texts if name != answer] or texts
        usual = column_kinds.put_longest_first([*others, answer], first)[0]
        asked = questions.choose("which has what they answer", texts, usual)
        other = {"prompt": asked, "completion": answer}
        draft.put("data.columns", {"text": answer} if asked == answer else other)
        try:
            chosen = _choose(draft, there, first)
        except prepare.UnknownColumns:
            raise error from None
    if not draft.is_given("data.columns"):
        draft.put("data.columns", chosen.names or None)
    draft.put("data.format", chosen.style)
    return chosen


def _is_open(data: Data) -> bool:
    return data.format == "auto" and not data.columns


def _list_most_common(
    first: Sequence[Mapping[str, Any]], encoder: encoders.Encoder | type[encoders.Encoder]
) -> list[str]:
    """Return the columns of the rows whose format most have: of files of several formats, the
    fewest rows are lost by it. Empty where no row alone has one."""
    known, styles = encoder.row_formats, dict[tuple[str, ...], str | None]()
    rows_of = dict[str, list[Mapping[str, Any]]]()
    for row in first:
        there = formats.list_columns([row])
        if (key := tuple(there)) not in styles:
            names = formats.guess_columns(there, known, encoder.column_sets)
            styles[key] = formats.recognise_format(formats.name_columns(there, names), known)
        if style := styles[key]:
            rows_of.setdefault(style, []).append(row)
    if not rows_of:
        return []
    most = max(rows_of.values(), key=len)
    return formats.list_columns(most)


def _choose(draft: Draft, there: list[str], first: Sequence[Mapping[str, Any]]) -> Chosen:
    recipe = draft.build()
    compares = recipe.objective_row.has_pairs
    encoder = preferences.PreferenceEncoder if compares else load.find_encoder(recipe.task_row)
    encoder = unpaired.UnpairedEncoder if recipe.objective_row.unpaired else encoder
    columns = _list_most_common(first, encoder) or there if _is_open(recipe.data) else there
    style, names = prepare.choose_format(recipe.data, columns, encoder, True, first)
    needed = {*encoder.row_formats[style], *EXTRA, *names, *["prompt"] * compares}
    if style == "unpaired":
        inner, inside = formats.recognise_labelled(formats.name_columns(there, names))
        needed |= {*formats.LABELLED.get(inner or "", ()), *inside.values()}
    read = {names.get(each, each).partition(".")[0] for each in needed}
    listed = dict.fromkeys(name.partition(".")[0] for name in there)
    unread = [name for name in listed if name not in read]
    return Chosen(style, dict(names), unread, first)
