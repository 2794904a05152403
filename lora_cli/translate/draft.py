"""The recipe that another tool's file becomes, while it is made, and what became of each key."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from lora_cli.translate.source import Keys, Source, list_leaves, spell


class Kind(StrEnum):
    """What can become of a key."""

    taken = "taken"
    none = "no counterpart"
    hand = "needs your hand"
    empty = "empty"


class Fate(NamedTuple):
    """What became of a key, and of all that it holds."""

    keys: Keys
    kind: Kind
    text: str
    """The recipe's key it became; why there is none and what to do; what to do by hand."""


class Draft:
    """Values of a recipe by their keys (`training.seed`, `method`), each with the reason that its
    line will give; and the fates of the source's keys."""

    def __init__(self, source: Source, tool: str) -> None:
        self.source = source
        self.tool = tool
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.fates: dict[Keys, Fate] = {}
        self.writers: dict[str, list[Keys]] = {}
        """The source's keys that each value comes from."""
        self.asked: list[str] = []
        """What needs a hand although no key of the source says it."""

    def get(self, *keys: str) -> Any:
        """Return a value of the source, or None."""
        value: Any = self.source.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def take(self, keys: Keys, to: str, value: Any, note: str = "") -> None:
        """Write `value` into the recipe as what the source's key says."""
        self.values[to] = value
        self.reasons[to] = spell(keys) + (f": {note}" if note else "")
        self.writers.setdefault(to, []).append(keys)
        self.tell(keys, Kind.taken, to + (f": {note}" if note else ""))

    def tell(self, keys: Keys, kind: Kind, text: str) -> None:
        """Record what became of a key; what was said of it before is replaced."""
        self.fates[keys] = Fate(keys, kind, text)

    def leave(self, keys: Keys, why: str) -> None:
        """Record that a key has no counterpart."""
        self.tell(keys, Kind.none, why)

    def ask(self, keys: Keys, what: str) -> None:
        """Record that a key needs the user's hand."""
        self.tell(keys, Kind.hand, what)

    def put_default(self, to: str, value: Any, note: str = "") -> None:
        """Write what the other tool does where its file says nothing, unless it said something."""
        if to not in self.values:
            self.values[to] = value
            self.reasons[to] = f"{self.tool}'s default" + (f": {note}" if note else "")

    def replace(self, to: str, value: Any, option: str) -> None:
        """Write what an option of the command line says in place of what the source does."""
        for keys in self.writers.pop(to, []):
            self.leave(keys, f"{option} goes before it")
        self.values[to], self.reasons[to] = value, option

    def drop(self, to: str, why: str) -> None:
        """Take a value out of the recipe again: its keys need the user's hand."""
        del self.values[to], self.reasons[to]
        writers = self.writers.pop(to, [])
        for keys in writers:
            self.ask(keys, why)
        if not writers:
            self.asked.append(why)

    def covers(self, keys: Keys) -> bool:
        """Return whether it is said what became of a key, or of one that it is part of."""
        return any(keys[:depth] in self.fates for depth in range(1, len(keys) + 1))

    def list_untold(self) -> list[Keys]:
        """Return the source's keys that nothing is said of yet."""
        return [keys for keys in list_leaves(self.source.data) if not self.covers(keys)]
