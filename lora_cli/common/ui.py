"""Show a person how a command gets on: prose and one progress line on stderr. stdout is left for
data."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_cli.common import privacy
from lora_cli.common.errors import LoraError

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
    "█": "#",
    "▁": "_",
}
"""What our own marks become where the output's encoding has none of them."""


def fit_to_encoding() -> None:
    """Let stdout and stderr take any text, whatever their encoding: our marks as their twins, other
    characters as escapes."""
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


_shown_as: dict[str, str] = {}


def show_as(copy: Path, given: Path) -> None:
    """Let messages name `given` where they would name `copy`, which stands for it in this
    process."""
    _shown_as[str(copy)] = str(given)


_hushed = False


@contextmanager
def hush() -> Iterator[None]:
    """Say and show nothing inside."""
    global _hushed
    before, _hushed = _hushed, True
    try:
        yield
    finally:
        _hushed = before


def say(text: str = "") -> None:
    """Print one line of prose to stderr, with secrets masked."""
    if _hushed:
        return
    print(privacy.mask_secrets(_name_given(text)), file=sys.stderr, flush=True)


def _name_given(text: str) -> str:
    for copy, given in _shown_as.items():
        text = text.replace(copy, given)
    return text


def warn(text: str) -> None:
    """Print a warning: the run goes on, but the user must know."""
    say(f"warning: {text}")


def render_error(error: LoraError) -> str:
    """Return `error: …`, a blank line and `hint: …`, the form of every failure."""
    text = f"error: {error.message}"
    return _name_given(f"{text}\n\nhint: {error.hint}" if error.hint else text)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns aligned with spaces under an underlined header: the first to the left, the
    others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def format_duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """A line that is rewritten in place on a terminal, and printed now and then where there is no
    terminal."""

    def __init__(self, plain_interval: float = 10.0) -> None:
        self.live = sys.stderr.isatty() and not _hushed
        self.plain_interval = plain_interval
        self.last_plain = float("-inf")

    def update(self, *parts: str, force: bool = False) -> None:
        """Show the parts; off a terminal at most every `plain_interval` seconds unless forced.

        On a narrow terminal parts are left out, from the last but one backwards: the first and the
        last say most.
        """
        text = "  ".join(parts)
        if self.live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            shown = list(parts)
            while len(text) > width and len(shown) > 2:
                del shown[-2]
                text = "  ".join(shown)
            sys.stderr.write("\r\x1b[2K" + text[:width])
            sys.stderr.flush()
        elif force or time.monotonic() - self.last_plain >= self.plain_interval:
            self.last_plain = time.monotonic()
            say(text)

    def clear(self) -> None:
        """Clear the line, to make room for prose."""
        if self.live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
