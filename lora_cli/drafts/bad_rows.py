"""What to type where rows cannot be used: by what is wrong with the first of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data import column_kinds, formats
from lora_cli.drafts.columns import Chosen
from lora_cli.drafts.rows import suggest_look

OF_A_KIND = re.compile(r"(\w+) is (?:a number|a list|a mapping|true or false|null)")


def suggest_mending(place: str, bad: formats.BadRow, chosen: Chosen) -> str:
    """Return the hint for rows of which the first that cannot be used is `bad`: its own, or columns
    that have texts where what was read has none, or the command that shows it."""
    if bad.hint != formats.MEND:
        return bad.hint.removesuffix(f", or {formats.SKIP}")
    found = OF_A_KIND.fullmatch(bad.kind)
    if found and (named := _suggest_column(found[1], chosen)):
        return named
    return suggest_look(place)


def _suggest_column(ours: str, chosen: Chosen) -> str | None:
    """Return the option that reads, for a column of ours without texts, the text inside of it or
    another column of the rows, if there is one."""
    theirs = chosen.names.get(ours, ours)
    there = dict.fromkeys(name for row in chosen.first for name in row)
    if theirs not in there:
        return None
    read = {name: chosen.names.get(name, name) for name in formats.FORMATS.get(chosen.style, ())}
    inside = _find_text_inside([row.get(theirs) for row in chosen.first])
    if inside is not None:
        return formats.suggest_columns(**read | {ours: f"{theirs}.{inside}"})
    kinds = column_kinds.tell_kinds(chosen.first)
    others = [name for name in there if not kinds.get(name) and name not in read.values()]
    return formats.suggest_columns(**read | {ours: others[0]}) if others else None


def _find_text_inside(values: Sequence[Any]) -> str | None:
    """Return the key of the one text that mappings have, or None."""
    first = next((value for value in values if isinstance(value, Mapping)), {})
    texts = [key for key, value in first.items() if isinstance(value, str)]
    return texts[0] if len(texts) == 1 else None
