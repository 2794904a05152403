"""Walk a long JSON text value by value, of which no more than one is held."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from typing import Any, TextIO

LONGEST = 2**22
"""Characters of a line, or of a value."""
PIECE = 2**20
"""Characters that are read at a time."""
SPACE = re.compile(r"[ \t\n\r]*")


class RepeatedKey(ValueError):
    """An object gives a key two values, of which Python's `json` would keep the last."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is given twice")
        self.key = key


class SeveralLists(ValueError):
    """An object has several lists of mappings, each of which may be the rows: their keys."""

    def __init__(self, *keys: str) -> None:
        super().__init__(f"it has several lists: {', '.join(keys)}")
        self.keys = keys


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises RepeatedKey where that loses a value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        said: dict[str, str] = {}
        for key, value in pairs:
            # as texts: 1 is True to Python, and NaN is not NaN
            as_text = json.dumps(value, sort_keys=True)
            if said.setdefault(key, as_text) != as_text:
                raise RepeatedKey(key)
    return made


_STRICT, _PLAIN = json.JSONDecoder(object_pairs_hook=_refuse_repeated), json.JSONDecoder()
"""Made once: to make one costs more than to read a row. That no value is lost costs 4 % of reading
100,000 rows of a prompt and an answer (0.23 to 0.24 s), and of reading as many chats of four turns
a quarter (0.33 to 0.40 s)."""
DECODE = _PLAIN.raw_decode


def parse(text: str) -> Any:
    """Return the value of a JSON text. Raises JSONDecodeError, RepeatedKey, and as `json.loads`
    ValueError for thousands of digits and RecursionError for thousands of brackets."""
    return _STRICT.decode(text)


class Text:
    """A part of a long text. What stood before it is forgotten, but for how many lines that were,
    and how much of the line it begins in."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.part, self.line, self.column = stream, "", 0, 0

    def read_on(self, at: int) -> bool:
        """Forget what stands before `at` and read as much again as is left, and return True; at
        the end of the text nothing changes."""
        rest = self.part[at:]
        if len(rest) > LONGEST:
            raise ValueError(f"a row of over {LONGEST:,} characters")
        more = self.stream.read(max(PIECE, len(rest)))
        if more:
            self.line += self.part.count("\n", 0, at)
            newline = self.part.rfind("\n", 0, at)
            self.column = at - newline - 1 if newline >= 0 else self.column + at
            self.part = rest + more
        return bool(more)


def walk_list(text: Text) -> Iterator[Any]:
    """Yield the values of a text that is one JSON list. Raises JSONDecodeError with the place in
    the part."""
    _refuse_more(text, (yield from _walk_items(text, 0)))


def walk_member(text: Text, wanted: str, only: bool = False) -> Iterator[Any]:
    """Yield the values of the list that a text, one JSON object, has under the key `wanted`; what
    it has under other keys is passed over. Raises JSONDecodeError as `walk_list`; where this is to
    be the `only` one, SeveralLists for another list of mappings, RepeatedKey for the key again."""
    at, is_passed = _expect(text, 0, "{", "Expecting value"), False
    while True:
        at = skip_space(text, at)
        if text.part[at : at + 1] != '"':
            raise json.JSONDecodeError(NO_NAME, text.part, at)
        key, at = decode_value(text, at)
        at = skip_space(text, _expect(text, at, ":", "Expecting ':' delimiter"))
        if only and key == wanted and is_passed:
            raise RepeatedKey(wanted)
        is_passed = is_passed or key == wanted
        if key == wanted and text.part[at : at + 1] == "[":
            at = yield from _walk_items(text, at)
        elif text.part[at : at + 1] == "[":
            first, at = _pass_list(text, at)
            if only and isinstance(first, dict):
                raise SeveralLists(wanted, key)
        else:
            _, at = decode_value(text, at)
        at = skip_space(text, at)
        if text.part[at : at + 1] == "}":
            return _refuse_more(text, at + 1)
        at = _expect(text, at, ",", "Expecting ',' delimiter")


NO_NAME = "Expecting property name enclosed in double quotes"


def _walk_items(text: Text, at: int) -> Generator[Any, None, int]:
    """Yield the values of the JSON list that begins at `at`; return where it ends."""
    wanted = "["
    while True:
        at = skip_space(text, at)
        sign = text.part[at : at + 1]
        if sign and sign in wanted[:2]:
            at, wanted = at + 1, {"[": "]value", ",": "value", "]": "end"}[sign]
            if wanted == "end":
                return at
            continue
        if "value" not in wanted:
            raise json.JSONDecodeError("Expecting ',' delimiter", text.part, at)
        value, at = decode_value(text, at)
        yield value
        wanted = ",]"


def _pass_list(text: Text, at: int) -> tuple[Any, int]:
    """Return the first value of the list that begins at `at`, None of an empty one, and where it
    ends; no more than one is held."""
    items, first = _walk_items(text, at), None
    while True:
        try:
            value = next(items)
        except StopIteration as ended:
            return first, ended.value
        first = value if first is None else first


def _expect(text: Text, at: int, sign: str, otherwise: str) -> int:
    """Return the place after a sign that has to come next."""
    at = skip_space(text, at)
    if text.part[at : at + 1] != sign:
        raise json.JSONDecodeError(otherwise, text.part, at)
    return at + 1


def _refuse_more(text: Text, at: int) -> None:
    """Raise JSONDecodeError where anything but space follows."""
    at = skip_space(text, at)
    if text.part[at : at + 1]:
        raise json.JSONDecodeError("Extra data", text.part, at)


def skip_space(text: Text, at: int) -> int:
    """Return where the next sign stands, or the end of the text."""
    at = SPACE.match(text.part, at).end()  # type: ignore[union-attr]
    while at == len(text.part) and text.read_on(at):
        at = SPACE.match(text.part).end()  # type: ignore[union-attr]
    return at


def decode_value(text: Text, at: int) -> tuple[Any, int]:
    """Return the value that begins at `at`, and where it ends, reading on as far as it goes; for
    one that gives a key two values, the RepeatedKey."""
    while True:
        try:
            value, end = _decode(text.part, at)
        except json.JSONDecodeError:
            if not text.read_on(at):
                raise
        else:
            if end < len(text.part):  # else a number may go on
                return value, end
            if not text.read_on(at):
                return value, end
        at = 0


def _decode(part: str, at: int) -> tuple[Any, int]:
    try:
        return _STRICT.raw_decode(part, at)
    except RepeatedKey as repeated:
        _, end = _PLAIN.raw_decode(part, at)
        return repeated, end
