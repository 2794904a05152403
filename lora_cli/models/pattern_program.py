"""Match one regular expression against names: the program that `patterns.py` runs in a process of
its own. Standard library only."""

from __future__ import annotations

import re


def handle(names: list[str], pattern: str) -> str | None:
    """Match the expression against the beginning of each name; return why it is none, or None."""
    try:
        expression = re.compile(pattern)
        for name in names:
            expression.match(name)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
