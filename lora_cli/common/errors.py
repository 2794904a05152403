"""The one exception users see, and how near-misses are named. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 4
"""Problems of one error that are shown."""


class LoraError(Exception):
    """Something a user can cause and mend.

    `message` says what is wrong (with file, line and field where there is one); `hint` what to
    type. The command line renders both and exits with `exit_code`; nothing else in the package
    catches it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LoraError):
    """A wrong recipe or wrong arguments: nothing was started. Exits 2."""

    exit_code = 2


class RejectedError(LoraError):
    """A result that failed its check; `files.staged_folder` keeps it, where it was given a place
    for that."""


def join_errors(where: str, problems: Sequence[tuple[str, str | None]]) -> UsageError:
    """Several (message, hint) as one error: a single one as it stands, more as a list headed `N
    problems {where}`, of which a line each is shown, and so many that the whole stays within
    six."""
    if len(problems) == 1:
        return UsageError(*problems[0])
    shown = problems if len(problems) <= SHOWN else problems[: SHOWN - 1]
    lines = [f"  {message}" + (f" ({hint})" if hint else "") for message, hint in shown]
    if more := len(problems) - len(shown):
        lines.append(f"  … and {more} more, which come up once these are mended")
    return UsageError(
        "\n".join([f"{len(problems)} problems {where}", *lines]),
        "lora schema --markdown lists every key",
    )


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely meant, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
