"""Look for a user's regular expression in what models say, within limits of time and memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import UsageError, confined

SECONDS = 2.0
"""Processor time that the expression may take on one text."""
MEMORY = 2**28
LONGEST = 10_000
"""Characters of an expression."""
_finder = confined.Confined(Path(__file__).with_name("regex_program.py"))


class Match(NamedTuple):
    """Whether an expression is in a text, and the text of its first group there, which may have
    no part in the match; without groups, that of the whole."""

    found: bool
    text: str | None


def refuse_pattern(pattern: str) -> None:
    """Raise UsageError for an expression that is none, or too long."""
    if len(pattern) > LONGEST:
        said = f"--regex has {len(pattern):,} characters"
        raise UsageError(said, f"one of at most {LONGEST:,}")
    find_all(pattern, [("", "")])


def has_groups(pattern: str) -> bool:
    """Return whether an expression, which is one, has a group that is compared."""
    return bool(re.compile(pattern).groups)


def find_all(pattern: str, texts: Sequence[tuple[str, str]]) -> list[Match]:
    """Return the first match in each text, which stands behind what it is called. Raises UsageError
    for an expression that takes longer than SECONDS on one, or is none."""
    try:
        answers = _finder.run(
            confined.Budget(SECONDS, MEMORY), pattern, [text for _, text in texts]
        )
    except confined.Stopped as stopped:
        takes = f"over {SECONDS:g} s" if stopped.why == "time" else "too much memory"
        raise UsageError(
            f"--regex {pattern!r} takes {takes} on {_find_slow(pattern, texts, stopped.done)}",
            "avoid a repeat within a repeat, such as (a+)+",
        ) from None
    for found, said in answers:
        if found is None:
            raise UsageError(
                f"--regex {pattern!r} is not a regular expression: {said}",
                "the syntax is that of Python's re",
            )
    return [Match(*each) for each in answers]


def _find_slow(pattern: str, texts: Sequence[tuple[str, str]], done: int) -> str:
    """Return what the text is called on which the program was stopped; answers come in bundles, so
    of `done` answers at least these are there, and the slow one is at or behind it."""
    for name, text in texts[done:]:
        try:
            _finder.run(confined.Budget(SECONDS, MEMORY), pattern, [text])
        except confined.Stopped:
            return name
    return texts[done][0]
