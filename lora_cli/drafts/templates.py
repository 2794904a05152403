"""A chat template that suits the rows, for a base that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data import formats
from lora_cli.drafts.columns import Chosen
from lora_cli.drafts.draft import Draft
from lora_cli.models import Base

STYLES = ("messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired")
"""Formats of rows that a template renders."""
KEY = "model.chat_template"


def settle_template(draft: Draft, base: Base, chosen: Chosen) -> str:
    """Put a template into the draft where the base has none: ChatML for conversations, else
    Alpaca's. Return in words which it is, nothing for rows that need none."""
    if not base.task.writes_next_tokens or chosen.style not in STYLES:
        return ""
    if draft.is_given(KEY):
        return f"{draft.read(KEY)}, as --set says"
    if base.load_tokenizer().chat_template:
        return "the base's own"
    name = "chatml" if _converse(chosen.first, chosen) else "alpaca"
    why = "for conversations" if name == "chatml" else "for questions with one answer"
    draft.put(KEY, name, "the base has none of its own")
    return f"{name}, {why}, as the base has none of its own"


def _converse(rows: Sequence[Mapping[str, Any]], chosen: Chosen) -> bool:
    """Return whether rows have more than a question and an answer."""
    convert = formats.find_converter(chosen.style)
    for row in rows:
        try:
            made = convert(formats.rename_columns(row, chosen.names))
        except formats.BadRow:
            continue
        made = made.chosen if chosen.style == "preference" else made
        made = made.answer if chosen.style == "unpaired" else made
        roles = [message["role"] for message in made.messages]
        if roles != ["user", "assistant"] or made.tools:
            return True
    return False
