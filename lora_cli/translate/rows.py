"""The data sets that another tool's file names, as `data.path` or `data.mix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.source import Keys, spell

PLACEHOLDER = "my-data.jsonl"
"""What stands for rows that the file does not name."""


class RowsDraft:
    """One data set while it is found out: its keys as in `data.mix`."""

    def __init__(self, draft: Draft, place: str) -> None:
        self.draft = draft
        self.place = place
        self.values: dict[str, Any] = {}
        self.writers: dict[str, Keys] = {}
        """The source's key that each value comes from."""

    def take(self, keys: Keys, to: str, value: Any, note: str = "") -> None:
        """Write a value as what the source's key says."""
        self.values[to] = value
        self.writers[to] = keys
        self.draft.tell(keys, Kind.taken, f"{self.place}.{to}" + (f": {note}" if note else ""))

    def name_column(self, keys: Keys, ours: str, theirs: Any) -> None:
        """Write the name of a column, unless it is the one that lora looks for."""
        if theirs != ours:
            self.values.setdefault("columns", {})[ours] = theirs
            self.writers["columns"] = keys
        self.draft.tell(keys, Kind.taken, f"{self.place}.columns: {ours}")


def open_rows(draft: Draft, count: int) -> list[RowsDraft]:
    """Return drafts of so many data sets, which know their places in the recipe."""
    if count == 1:
        return [RowsDraft(draft, "data")]
    return [RowsDraft(draft, f"data.mix[{index}]") for index in range(count)]


def put_rows(draft: Draft, rows: Sequence[RowsDraft], keys: Keys) -> None:
    """Write data sets into the recipe: one as `data.path` with what belongs to it, more as
    `data.mix`. What cannot be used is dropped with the source's `keys`."""
    if len(rows) == 1:
        for name, value in rows[0].values.items():
            draft.values[f"data.{name}"] = value
            writer = rows[0].writers.get(name, keys)
            draft.reasons[f"data.{name}"] = spell(writer)
            draft.writers[f"data.{name}"] = [writer]
    elif rows:
        draft.values["data.mix"] = [each.values for each in rows]
        draft.reasons["data.mix"] = spell(keys)
        draft.writers["data.mix"] = [keys]
