"""Define the exceptions that users see, and find the name that a typo meant. Standard library
only."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from typing import Self

SHOWN = 4
"""How many problems one error lists."""


class LoraError(Exception):
    """A problem that the user can cause and mend.

    `message` says what is wrong (with file, line and field where there is one), `details` more of
    it; `hint` says what to type. Each is one line. The command line shows them and exits with
    `exit_code`. Other code catches it only to add what it knows, or where it has another way.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, details: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *details]))
        self.message = message
        self.hint = hint
        self.details = details

    def with_message(self, message: str) -> Self:
        """Return the same error, of the same class, with the same details and hint, in other
        words."""
        made = copy.copy(self)
        made.message = message
        made.args = ("\n".join([message, *made.details]),)
        return made


class UsageError(LoraError):
    """A wrong recipe or wrong arguments; nothing was started. Exits 2."""

    exit_code = 2


class RejectedError(LoraError):
    """A result that failed its check. `files.staged_folder` keeps it if it was given a place for
    that."""


def join_errors(where: str, problems: Sequence[tuple[str, str | None]]) -> UsageError:
    """Return several (message, hint) pairs as one error.

    A single pair stays as it is. Several become a list headed `N problems {where}` with a line
    each; so many are listed that the whole error stays within six lines.
    """
    if len(problems) == 1:
        return UsageError(*problems[0])
    shown = problems if len(problems) <= SHOWN else problems[: SHOWN - 1]
    lines = [f"  {message}" + (f" ({hint})" if hint else "") for message, hint in shown]
    if more := len(problems) - len(shown):
        lines.append(f"  … and {more} more, shown once these are mended")
    return UsageError(
        f"{len(problems)} problems {where}", "lora schema --markdown lists every key", lines
    )


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that `word` most likely meant, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
