"""The process's own streams: open, able to take any text, and silent where a library writes past
Python. Standard library only."""

from __future__ import annotations

import codecs
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TWINS = {
    "…": "...",
    "·": "*",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "→": "->",
    "≠": "!=",
    "≤": "<=",
    "≥": ">=",
    "⟦": "[[",
    "⟧": "]]",
    "Δ": "delta ",
    "‖": "||",
    "²": "^2",
    "▁": "_",
    "▂": ".",
    "▃": "-",
    "▄": "=",
    "▅": "+",
    "▆": "*",
    "▇": "%",
    "█": "#",
    "━": "=",
    "─": "-",
}
"""What our own marks become where the output's encoding has none of them."""


def open_streams() -> None:
    """Let stdout and stderr take any text, whatever their encoding: our marks as their twins, other
    characters as escapes; and stdin give one, whatever is typed.

    A stream that was closed is opened on nothing, or the next file that is opened would get its
    place and what a library writes to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    codecs.register_error("twins", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="twins")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for the characters that cannot be encoded, and where to go on."""
    assert isinstance(error, UnicodeEncodeError), "it is for output alone"
    failed = error.object[error.start : error.end]
    spelled = (
        TWINS.get(each) or each.encode("ascii", "backslashreplace").decode() for each in failed
    )
    return "".join(spelled), error.end


_silence = threading.RLock()


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Let what is written to stderr's descriptor past Python, as a panic of Rust's is, go nowhere
    inside; what is said here is still seen. For one thread at a time: the others wait."""
    with _silence:
        said, kept = sys.stderr, os.dup(2)
        try:
            if _writes_to_descriptor(said):
                said.flush()
                sys.stderr = os.fdopen(
                    kept, "w", encoding=said.encoding, errors=said.errors, closefd=False
                )
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            yield
        finally:
            sys.stderr = said
            os.dup2(kept, 2)
            os.close(kept)


def _writes_to_descriptor(stream: Any) -> bool:
    """Return whether it is the process's own stderr, and none that stands in for it."""
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):  # none, or one in memory
        return False
