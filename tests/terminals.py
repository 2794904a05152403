"""A program on a terminal of its own, whose picture is kept by an emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import pyte
from rich.cells import cell_len
from rich.text import Text

SECONDS = 120
"""For what takes two on a machine with nothing else to do."""


class Terminal:
    """Columns and rows that show what `run(path of the terminal)` writes there."""

    left: ClassVar[list[Terminal]] = []
    """Those whose program has not ended."""

    def __init__(self, run: Callable[[str], object], columns: int, rows: int = 24) -> None:
        self.ours, self.theirs = pty.openpty()
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.result: object = None
        self.resize(columns, rows)
        path = os.ttyname(self.theirs)
        self.thread = threading.Thread(
            target=lambda: setattr(self, "result", run(path)), daemon=True
        )
        self.thread.start()
        self.left.append(self)

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size; its program hears of it."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def wrap_anew(self, columns: int) -> None:
        """Make the window narrower or wider as most terminals do: lines that are too long are
        wrapped, and the cursor stays on its character."""
        seen, place = self.lines(), self.screen.cursor.y
        seen += [""] * (place + 1 - len(seen))
        self.screen = pyte.HistoryScreen(columns, self.screen.lines, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.stream.feed("".join(f"{line}\r\n" for line in seen[:place]).encode())
        above = self.screen.cursor.y
        self.stream.feed("\r\n".join(seen[place:]).encode() + f"\x1b[{above + 1}H".encode())
        self.resize(columns, self.screen.lines)

    def type(self, keys: str) -> None:
        """Press keys: \\x03 is Ctrl-C."""
        os.write(self.ours, keys.encode())

    def read(self, seconds: float) -> bool:
        """Take what is written within some seconds; return whether anything was."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        piece = os.read(self.ours, 1 << 16)
        self.written += piece
        self.stream.feed(piece)
        return True

    def wait_for(self, shown: str) -> list[str]:
        """Return the picture once a line of it matches."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and self.thread.is_alive():
            self.read(0.05)
            if any(re.search(shown, line) for line in self.lines()):
                return self.lines()
        self.type("\x03\x03")
        raise AssertionError(f"{shown} was never shown:\n" + "\n".join(self.lines()))

    def end(self) -> list[str]:
        """Return the last picture, when the program has ended."""
        until = time.monotonic() + SECONDS
        while self.thread.is_alive() and time.monotonic() < until:
            self.read(0.05)
        while self.read(0.1):
            pass
        self.thread.join(5)
        assert not self.thread.is_alive(), "\n".join(self.lines())
        self.close()
        return self.lines()

    def close(self) -> None:
        """Hang up, as a window does that is closed: the program hears of it, and a write fails."""
        self.left.remove(self)
        os.close(self.theirs)
        os.close(self.ours)

    def lines(self) -> list[str]:
        """What is seen, without the empty lines at the end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    def history(self) -> list[str]:
        """What is seen, and what has gone out of sight above."""
        columns = self.screen.columns
        above = ["".join(row[x].data for x in range(columns)) for row in self.screen.history.top]
        return [*(line.rstrip() for line in above), *self.lines()]

    def frames(self) -> list[list[str]]:
        """The lines of each picture that was drawn anew, without their colours."""
        parts = self.written.decode().split("\r\x1b[J\r\n")[1:]
        drawn = [re.split(r"\r(?:\x1b\[\d+A|(?!\n))", part)[0] for part in parts]
        return [[Text.from_ansi(line).plain for line in each.split("\r\n")] for each in drawn]


def close_left() -> None:
    """Close the terminals that a failed test has left, and wait for their programs: one that waits
    for somebody to read would never end, nor whatever waits for it."""
    for terminal in list(Terminal.left):
        terminal.close()
        terminal.thread.join(SECONDS)
        assert not terminal.thread.is_alive(), "a program outlives its terminal"


def measure(line: str) -> int:
    """Cells that a line takes."""
    return cell_len(line)
