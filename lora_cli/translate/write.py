"""The text of the recipe that another tool's file becomes: each line with the key it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_cli.common import escape
from lora_cli.recipe import strict_yaml
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.source import spell

SECTIONS = ("model", "lora", "quantization", "data", "preference", "training", "distributed")
COLUMN = 52
"""Where the reasons stand, beside values that are not longer."""


def write_recipe(draft: Draft) -> str:
    """Return the recipe as YAML: what needs a hand first, then its sections in the usual order."""
    lines = [*_list_head(draft), *_list_values(draft, "", ("objective", "method"))]
    for section in SECTIONS:
        names = [key for key in draft.values if key.startswith(f"{section}.")]
        if names:
            lines += ["", f"{section}:"]
            lines += _list_values(draft, "  ", names)
    lines += ["", *_list_values(draft, "", ("output_dir",))]
    return "\n".join(lines).rstrip("\n") + "\n"


def _list_head(draft: Draft) -> Iterator[str]:
    yield f"# From {draft.tool}'s {_show(draft.source.path.name)}, by lora import."
    yield "# After a value stands its key there, where that has another name, or why it is here."
    fates = [fate for fate in draft.fates.values() if fate.kind == Kind.hand]
    asked = [f"{spell(fate.keys)}: {fate.text}" for fate in fates] + draft.asked
    if asked:
        yield "# Needs your hand:"
    for text in asked:
        yield f"#   {_show(text)}"


def _list_values(draft: Draft, indent: str, keys: Any) -> Iterator[str]:
    for key in keys:
        if key not in draft.values:
            continue
        name = key.rpartition(".")[2]
        text = strict_yaml.dump({name: draft.values[key]}).splitlines()
        reason = f"# {_show(draft.reasons[key])}" if draft.reasons[key] != name else ""
        if len(text) > 1 and isinstance(draft.values[key], str):  # within quotes it would be text
            yield f"{indent}{reason}".rstrip()
        else:
            text[0] = f"{indent + text[0]:{COLUMN}}  {reason}".rstrip().removeprefix(indent)
        yield from (indent + line for line in text)


def _show(text: str) -> str:
    """Return others' text as it may stand in a comment: one line of what can be shown."""
    return " ".join(escape(text).split())
