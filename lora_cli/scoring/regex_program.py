"""Find what one regular expression finds in texts: the program that `regexes.py` runs in a process
of its own. Standard library only."""

from __future__ import annotations

import re


def handle(pattern: str, text: str) -> list[str | bool | None]:
    """Return whether the expression is somewhere in the text, and what its first group is there
    (the whole of it without groups); where it is no expression, None and why."""
    try:
        found = re.search(pattern, text)
    except (re.error, RecursionError, OverflowError) as error:
        return [None, str(error)]
    if found is None:
        return [False, None]
    return [True, found[1] if found.re.groups else found[0]]
