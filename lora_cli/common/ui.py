"""Write to the screen, which nothing else does: prose, one progress line or a picture to stderr,
results to stdout.

What is given as a line is shown as one, whoever wrote what is in it: controls of the terminal are
written out, and secrets are ***.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.common import privacy, terminal
from lora_cli.common.errors import LoraError
from lora_cli.common.shown import HIDDEN, count_columns, escape, name_given

if TYPE_CHECKING:  # rich is for terminals
    from lora_cli.common.screen import Line, Region

KEPT = "\n\t"
"""What a text of several lines may have of the characters that are written out elsewhere."""
PLAIN = "\x1b[0m"
LONGEST_WORD = 2**12
LONGEST_LINE = 2**14
"""Characters of a line, with a path of the longest kind in it: more is a stranger's."""


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


def say(*lines: str) -> None:
    """Print prose to stderr, a line for each argument. That stderr is gone, or its disk full, does
    not end what is going on."""
    if not _hushed:
        with suppress(OSError):
            _write(sys.stderr, _join(lines))


def warn(text: str) -> None:
    """Print a warning: the run goes on, but the user must know."""
    say(f"warning: {text}")


def ask(text: str = "> ") -> None:
    """Print what asks for a line to stderr."""
    _write(sys.stderr, text)


def report(*lines: str) -> None:
    """Print what was found to stdout, a line for each argument."""
    _write(sys.stdout, _join(lines))


def report_json(data: Any) -> None:
    """Print `data` (dicts, lists, scalars) to stdout as a line of JSON."""
    plain = (sys.stdout.encoding or "utf-8").lower() != "utf-8"  # of a text in memory: None
    text = json.dumps(privacy.mask_each(data), ensure_ascii=plain)
    _write(sys.stdout, HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text) + "\n")


def report_path(path: Path) -> None:
    """Print the path of a result to stdout: byte for byte where a program reads it, on a terminal
    as everything else."""
    if sys.stdout.isatty() or not isinstance(sys.stdout, io.TextIOWrapper):
        report(str(path))
    else:
        _write(sys.stdout.buffer, os.fsencode(path) + b"\n")


def report_file(text: str) -> None:
    """Print what might be a file to stdout, however long its lines."""
    _write(sys.stdout, _clean(text, KEPT))


def report_texts(parts: Sequence[tuple[str, str]]) -> None:
    """Print texts of several lines to stdout, indented, each in the colour before it where stdout
    is a terminal."""
    colour = sys.stdout.isatty() and not (terminal.is_colourless() or terminal.is_dumb())
    shown = [
        f"{code}{text}{PLAIN}" if colour else text
        for code, text in ((code, _clean(text, KEPT)) for code, text in parts)
    ]
    _write(sys.stdout, textwrap.indent("".join(shown), "  ", lambda _: True) + "\n")


class Answer:
    """An answer of a model, printed to stdout as it comes: its lines and tabs are its own."""

    def __init__(self) -> None:
        self.held = ""
        """The beginning of a word, which may be that of a secret."""
        self.joined = ""
        """The character that a joiner at the beginning of the next piece would join."""

    def add(self, piece: str) -> None:
        """Print a piece, but for a word that may go on."""
        text = self.held + piece
        self.held = text[re.search(r"[!-~]*$", text).start() :][-LONGEST_WORD:]  # type: ignore[union-attr]
        self._print(text.removesuffix(self.held))

    def end(self) -> None:
        """Print the rest of it, and end the line."""
        self._print(self.held, "\n")

    def _print(self, text: str, after: str = "") -> None:
        shown = _clean(f"{self.joined}{text}", KEPT).removeprefix(self.joined)
        _write(sys.stdout, shown + after)
        last = text[-1:]
        if last and not HIDDEN.match(last):
            self.joined = "" if last.isascii() else last


def _join(lines: Sequence[str]) -> str:
    return "".join(f"{_clean(line)}\n" for line in lines)


def _clean(text: str, keep: str = "") -> str:
    """Return a text as it is shown: without secrets, its controls written out, and files named as
    the user named them."""
    if not keep and len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}… ({len(text):,} characters)"
    return escape(privacy.mask_secrets(name_given(text)), keep)


def _write(stream: Any, text: Any) -> None:
    """Write to stdout or stderr at once, above what a `Screen` shows there and in place of the line
    of a `Progress`. One that fails gets no more: Python would try again at the end."""
    global _line
    region = _find_region(stream) if isinstance(text, str) else None
    over_line = _line and isinstance(text, str) and terminal.is_ours(stream)
    with _silenced_where_it_fails(stream):
        if stream is not sys.stderr:
            sys.stdout.flush()
        shown = f"{ERASE}{text}" if region or over_line else text
        _line = _line and not over_line
        try:
            stream.write(shown)
            stream.flush()
        except RuntimeError:  # a signal has come amid another write, whose buffer is not ours
            _write_past_buffer(stream, shown)
            return
        if region and text.endswith("\n"):
            region.draw_again(*_measure_window())


def _write_past_buffer(stream: Any, text: Any) -> None:
    data = text if isinstance(text, bytes) else text.encode(stream.encoding, stream.errors)
    os.write(stream.fileno(), data)


@contextmanager
def _silenced_where_it_fails(stream: Any) -> Iterator[None]:
    """Let what is written to a stream that fails inside go nowhere from then on."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def list_lines(error: LoraError) -> list[str]:
    """Return the lines of every failure: `error: …`, its details, an empty line and `hint: …`."""
    lines = [f"error: {error.message}", *error.details]
    return [*lines, "", f"hint: {error.hint}"] if error.hint else lines


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines: columns aligned with spaces under an underlined header, the first to the left,
    the others to the right."""
    header, *rows = [[escape(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(count_columns, column)) for column in zip(header, *rows)]

    def line(row: Sequence[str]) -> str:
        room = [" " * (width - count_columns(cell)) for cell, width in zip(row, widths)]
        cells = [f"{row[0]}{room[0]}", *map("".join, zip(room[1:], row[1:]))]
        return "  ".join(cells).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


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
    terminal, or another program is in its foreground."""

    def __init__(self, plain_interval: float = 10.0) -> None:
        self.plain_interval = plain_interval
        self.last_plain = float("-inf")

    def update(self, *parts: str, force: bool = False) -> None:
        """Show the parts; off a terminal at most every `plain_interval` seconds unless forced.

        On a narrow terminal parts are left out, from the last but one backwards: the first and the
        last say most.
        """
        if _region is not None:  # which has no room for another line
            return
        if width := _measure_line():
            shown = [_clean(part) for part in parts]
            while count_columns("  ".join(shown)) > width and len(shown) > 2:
                del shown[-2]
            line = "  ".join(shown)[:width]
            while count_columns(line) > width:
                line = line[:-1]
            self._rewrite(line)
        elif force or time.monotonic() - self.last_plain >= self.plain_interval:
            self.last_plain = time.monotonic()
            say("  ".join(parts))

    def clear(self) -> None:
        """Clear the line, to make room for prose."""
        if _region is None and _line and _measure_line():
            self._rewrite("")

    def _rewrite(self, text: str) -> None:
        global _line
        _line = True  # whatever is there goes
        with suppress(OSError):
            _write(sys.stderr, text)
        _line = bool(text)


_line = False
"""Whether the terminal's last line is that of a `Progress`."""
ERASE = "\r\x1b[J"
"""Back to the line's beginning, and nothing from there on."""
_region: Region | None = None
"""What is shown at the terminal's end."""
INTERVAL = 0.25
"""Seconds between two drawings, at least."""
SMALLEST = (36, 8)
"""Columns and rows of a window that a picture is drawn in."""


class Screen:
    """A picture of some lines at the end of a terminal, drawn anew in place; what is said meanwhile
    appears above it."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def is_due(self) -> bool:
        """Return whether it is time for another drawing."""
        return time.monotonic() - self.last >= INTERVAL

    def show(self, draw: Callable[[int, int], Sequence[Line]]) -> bool:
        """Draw the lines that `draw` gives for so many columns and rows, of whoever's texts.

        Return False, with nothing drawn, where there is no place for a picture: no terminal of
        ours, one that cannot go back a line, or a small window.
        """
        global _region
        columns, rows = _measure_window()
        if columns < SMALLEST[0] or rows < SMALLEST[1]:
            self.close()
            return False
        self.last = time.monotonic()
        lines = [_clean_line(line) for line in draw(columns, rows)]
        with suppress(OSError), _silenced_where_it_fails(sys.stderr):
            if _region is None:
                _region = _open_region()
            _region.draw(lines, columns, rows)
        return True

    def close(self) -> None:
        """Remove the picture."""
        remove_picture()


def _clean_line(line: Line) -> Line:
    """Return a line of a picture as it may be shown: looked at as a whole, which takes a quarter of
    the time of its parts, and in one style where something had to be written out."""
    text = "".join(part for part, _ in line)
    cleaned = _clean(text)
    return line if cleaned == text else [(cleaned, "")]


def _find_region(stream: Any) -> Region | None:
    """Return what is shown on the terminal that a stream goes to, if that is ours to draw on."""
    return _region if _region is not None and terminal.is_ours(stream) else None


def _open_region() -> Region:
    from lora_cli.common.screen import Region

    region = Region(sys.stderr, ERASE, terminal.is_colourless())
    region.begin()
    atexit.register(remove_picture)
    return region


def remove_picture() -> None:
    """Leave the terminal as it was before a picture was shown, with the cursor where that began."""
    global _region
    region = _find_region(sys.stderr)
    _region = None
    if region is not None:
        with suppress(OSError), _silenced_where_it_fails(region.stream):
            try:
                region.stop()
            except RuntimeError:  # as in _write
                _write_past_buffer(region.stream, ERASE)


def wrap(text: str, width: int, most: int) -> list[str]:
    """Return whoever's text in `most` pieces at most of up to `width` cells, for a picture."""
    from lora_cli.common import screen

    return list(screen.wrap(_clean(text), width, most))


def _measure_line() -> int:
    """Return how many characters a line on stderr may have, 0 where it is no terminal of ours."""
    return max(0, _measure_window()[0] - 1)


def _measure_window() -> tuple[int, int]:
    """Return columns and rows of the terminal that stderr is, (0, 0) where nothing is to be drawn
    there."""
    return (0, 0) if _hushed else terminal.measure_window(sys.stderr)
