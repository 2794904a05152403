"""Lines at the end of a terminal, drawn anew in place by rich's Live. `ui.Screen` is the way to it.

Live leaves the cursor behind its last line, and goes up by as many lines as it has drawn: too few
where the window became narrower and the terminal has wrapped them anew. Here the cursor stays on
the first line, which is empty, and from there on everything is erased and drawn. So no drawing has
to know the one before, what is written in between needs no more than `erase` before it, and a
program that is killed leaves a cursor that is seen.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.cells import cell_len, chop_cells
from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    Group,
    RenderableType,
    RenderResult,
)
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

Line = Sequence[tuple[str, str]]
"""Texts with the style of each, as rich names it; "" for a plain one."""


class _Code:
    """A code for the terminal, amid what rich prints."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.code, None, [(ControlType.HOME,)])


class Region(Live):
    """The lines that are drawn anew."""

    def __init__(self, stream: TextIO, erase: str, colourless: bool) -> None:
        self.stream, self.erase = stream, erase
        console = Console(
            file=stream, force_terminal=True, no_color=colourless, highlight=False, emoji=False
        )
        super().__init__(
            Text(),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.height = 1

    def begin(self) -> None:
        """Start, with a cursor that is seen."""
        self.start()
        self.console.show_cursor(True)

    def draw(self, lines: Sequence[Line], columns: int, rows: int) -> None:
        """Draw the lines, cut to the window's size, in place of those that are there."""
        width = columns - 1  # in the last column a cursor may already be on the next line
        self.console.size = (columns, rows)
        shown = [self._cut(line, width) for line in [[], *lines][: rows - 1]]
        self.height = len(shown)
        self.update(Group(*shown), refresh=True)

    def draw_again(self, columns: int, rows: int) -> None:
        """Draw the lines below what was printed; in a window of another size, which would wrap
        them, none until they are drawn for it."""
        if self.console.size != (columns, rows):
            self.height = 1
            self.update(Text())
        self.refresh()

    def refresh(self) -> None:
        """Draw again, but not on a terminal that is halted (Ctrl-S) and would halt us."""
        if sys.platform == "win32" or select.select([], [self.stream], [], 0)[1]:
            super().refresh()

    def _cut(self, line: Line, width: int) -> Text:
        """Return a line of `width` cells at most, in the characters that the stream has."""
        cut = Text(no_wrap=True, end="\n")
        for text, style in line:
            cut.append(spell(text, self.stream), style=style or None)
        if cut.cell_len > width:
            mark = spell("…", self.stream)
            cut.truncate(width - len(mark), overflow="crop")
            cut.append(mark)
        return cut

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Erase, print what was asked for, draw, and go back to the first line."""
        up = f"\x1b[{self.height - 1}A" if self.height > 1 else ""
        return [_Code(self.erase), *renderables, _Unended(self.renderable), _Code(f"\r{up}")]

    def stop(self) -> None:
        """Leave nothing but the cursor, where the first line was."""
        self.height = 1
        self.update(Text())
        super().stop()


class _Unended:
    """What is printed, without the end of its last line."""

    def __init__(self, printed: RenderableType) -> None:
        self.printed = printed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, line in enumerate(console.render_lines(self.printed, options, pad=False)):
            if number:
                yield Segment.line()
            yield from line


def spell(text: str, stream: TextIO) -> str:
    """Return a text as the stream's encoding shows it; see `streams.TWINS`."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, stream.errors or "strict").decode(encoding)


def wrap(text: str, width: int, most: int) -> Iterator[str]:
    """Yield a text in `most` pieces at most of up to `width` cells; … ends the last where some is
    left."""
    pieces = chop_cells(text, width)
    yield from pieces[: most - 1]
    if len(pieces) > most:
        cut = pieces[most - 1]
        while cell_len(cut) >= width:
            cut = cut[:-1]
        yield f"{cut}…"
    elif len(pieces) == most:
        yield pieces[-1]
