"""What became of each key of another tool's file, line by line on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lora_cli.common import say, spell_count
from lora_cli.translate import rules
from lora_cli.translate.draft import Draft, Fate, Kind
from lora_cli.translate.source import spell

COUNTED = {
    Kind.taken: "taken",
    Kind.none: "without a counterpart",
    Kind.hand: "for your hand",
    Kind.empty: "empty",
}
WIDEST = 44
"""Characters of `key: value`, beyond which a value is cut."""


def show_fates(draft: Draft) -> None:
    """Say each key once: what was taken and as what, what has no counterpart and why, what is
    empty, what needs a hand; and the tool's own defaults that the recipe says."""
    by_kind = {kind: [f for f in _sort(draft) if f.kind == kind] for kind in Kind}
    counts = ", ".join(f"{len(by_kind[kind])} {words}" for kind, words in COUNTED.items())
    say(f"{draft.source.path}: {draft.tool}'s; of {spell_count(len(draft.fates), 'key')} {counts}")
    for kind in (Kind.taken, Kind.none):
        if by_kind[kind]:
            say("", kind, *_format(draft, by_kind[kind]))
    if by_kind[Kind.empty]:
        say("", f"{Kind.empty}: {', '.join(spell(fate.keys) for fate in by_kind[Kind.empty])}")
    own = [key for key, why in draft.reasons.items() if why.startswith(f"{draft.tool}'s default")]
    if own:
        values = (f"{key}: {draft.values[key]}" for key in own)
        say("", f"{draft.tool}'s defaults, written out: {', '.join(values)}")
    if by_kind[Kind.hand] or draft.asked:
        say("", Kind.hand, *_format(draft, by_kind[Kind.hand]), *(f"  {a}" for a in draft.asked))
    say("")


def _sort(draft: Draft) -> Sequence[Fate]:
    return sorted(draft.fates.values(), key=lambda fate: draft.source.find_line(fate.keys))


def _format(draft: Draft, fates: Sequence[Fate]) -> Iterator[str]:
    """Yield `line  key: value  text` for each fate, in columns."""
    shown = [_show_value(draft, fate) for fate in fates]
    width = max((len(text) for text in shown), default=0)
    for fate, text in zip(fates, shown):
        line = draft.source.find_line(fate.keys)
        yield f"  {line:>4}  {text:{width}}  {fate.text}"


def _show_value(draft: Draft, fate: Fate) -> str:
    value: Any = draft.source.data
    for key in fate.keys:
        value = value[key]
    if rules.SECRET.search(str(fate.keys[-1])):
        return f"{spell(fate.keys)}: ***"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    whole = f"{spell(fate.keys)}: {text}"
    return whole if len(whole) <= WIDEST else whole[: WIDEST - 1] + "…"
