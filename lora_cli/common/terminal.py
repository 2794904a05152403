"""What the terminal is that a stream goes to: ours to draw on, its size, whether it obeys codes and
shows colours. Standard library only."""

from __future__ import annotations

import os
from typing import Any


def is_ours(stream: Any) -> bool:
    """Return whether a stream goes to a terminal that is ours to draw on."""
    return bool(stream.isatty()) and not _is_background(stream.fileno())


def is_dumb() -> bool:
    """Return whether the terminal shows codes instead of obeying them."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def is_colourless() -> bool:
    """Return whether the user wants no colours: see no-color.org."""
    return bool(os.environ.get("NO_COLOR"))


def measure_window(stream: Any) -> tuple[int, int]:
    """Return columns and rows of the terminal that a stream goes to, (0, 0) where it is none of
    ours, or cannot go back."""
    try:
        if is_dumb() or not is_ours(stream):
            return 0, 0
        columns, rows = os.get_terminal_size(stream.fileno())
        return columns or 80, rows or 24  # one that nobody has given a size says 0
    except OSError:  # it has just been closed
        return 0, 0


def _is_background(terminal: int) -> bool:
    """Return whether a shell has another program in the foreground of this terminal."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except (AttributeError, OSError):  # Windows, or not the terminal that this was started from
        return False
