"""A picture at a terminal's end: drawn anew in place, what is said appears above it, and nothing of
it is left.

Hermetic: a pseudo-terminal and an emulator. Alone: pytest tests/common/test_screen.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.terminals import Terminal, measure

ROOT = Path(__file__).parent.parent.parent
BEGIN = """
import os, sys, time
from lora_cli.common import streams, ui
streams.open_streams()
screen = ui.Screen()
LONG = "日本 long " * 30
def draw(columns, rows):
    return [[("title ", "bold"), (f"{columns}x{rows}", "cyan")], [(f"step {step} {LONG}", "")], [("▁▄█ hf_abcdefghijklmnopqrst \\x1b[2J", "")]]
"""


def start(code: str, columns: int = 50, rows: int = 12, **environment: str) -> Terminal:
    """Run Python's code on a terminal, as its session's leader."""

    def run(path: str) -> int:
        def lead() -> None:
            os.setsid()
            for number in range(3):
                os.dup2(os.open(path, os.O_RDWR), number)

        given = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        cleared = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        return subprocess.run(
            [sys.executable, "-c", BEGIN + code],
            env={**cleared, **given, **environment},
            preexec_fn=lead,
        ).returncode

    return Terminal(run, columns, rows)


WAIT = "\nwhile not os.path.exists({!r}): time.sleep(0.01)\n"


def picture(step: int, columns: int, rows: int = 12) -> list[str]:
    """The lines that `draw` is to become in a window, the first of them empty."""
    long = f"step {step} " + "日本 long " * 30
    while measure(long) > columns - 2:
        long = long[:-1]
    long += " " * (columns - 2 - measure(long))  # half of a wide character
    return ["", f"title {columns}x{rows}", f"{long}…", r"▁▄█ *** \x1b[2J"]


def test_a_picture_is_drawn_in_place_and_removed() -> None:
    drawing = "for step in range(5): screen.show(draw)\n"
    kept = start(drawing + "ui._region = None\n")  # as after kill -9
    assert kept.end() == picture(4, 50)
    assert not kept.screen.cursor.hidden
    assert (kept.screen.cursor.x, kept.screen.cursor.y) == (0, 0)
    for end in ("screen.close()", "1 / 0", "sys.exit(3)"):
        terminal = start(drawing + f"ui.say('before')\n{end}\n")
        lines = terminal.end()
        assert lines[0] == "before"
        assert len(terminal.frames()) == 6
        assert not any("title" in line for line in lines)
        assert not terminal.screen.cursor.hidden
        assert terminal.result == {"s": 0, "1": 1}.get(end[0], 3) or end.startswith("sys")


def test_what_is_said_appears_above_it_as_ever() -> None:
    secret = "hf_abcdefghijklmnopqrst"
    code = f"step = 1\nscreen.show(draw)\nui.say('one', 'path ' + 'x' * 60)\nui.warn('{secret} \\x1b[2J')\nui.report('found')\n"
    terminal = start(code + "ui._region = None\n")
    said = ["one", "path " + "x" * 45, "x" * 15, r"warning: *** \x1b[2J", "found"]
    assert terminal.end() == [*said, *picture(1, 50)]


def test_a_picture_scrolls_with_what_is_said() -> None:
    code = "for step in range(40):\n  screen.show(draw)\n  ui.say(f'line {step}')\n"
    terminal = start(code + "ui._region = None\n")
    last = terminal.end()
    assert last[-4:] == picture(39, 50)
    history = terminal.history()
    assert [line for line in history if line.startswith("line")] == [f"line {n}" for n in range(40)]
    assert sum("title" in line for line in history) == 1


@pytest.mark.parametrize("wraps", [False, True], ids=["cuts", "wraps"])
@pytest.mark.parametrize("size", [(37, 24), (120, 24), (50, 30)])
def test_a_window_may_change(size: tuple[int, int], wraps: bool, tmp_path: Path) -> None:
    """Whether its terminal cuts lines that are too long then, as xterm does, or wraps them."""
    go = tmp_path / "go"
    code = f"step = 0\nscreen.show(draw)\nui.say('said'){WAIT.format(str(go))}"
    code += "for step in range(3): screen.show(draw)\nui.say('again')\nui._region = None\n"
    terminal = start(code, 50, 24)
    terminal.wait_for("said")
    while terminal.read(0.3):
        pass
    assert terminal.lines()[1:] == picture(0, 50, 24)
    if wraps:
        terminal.wrap_anew(size[0])
    terminal.resize(*size)
    go.touch()
    assert terminal.end() == ["said", "again", *picture(2, *size)]


@pytest.mark.parametrize(
    ("columns", "rows", "environment"),
    [(50, 12, {"TERM": "dumb"}), (20, 12, {}), (50, 5, {})],
    ids=["dumb", "narrow", "low"],
)
def test_there_is_no_picture_where_there_is_no_place(
    columns: int, rows: int, environment: dict[str, str]
) -> None:
    code = "progress = ui.Progress()\nstep = 0\nassert not screen.show(draw)\nprogress.update('step 1', 'x' * 60)\nassert 'rich' not in sys.modules\n"
    terminal = start(code, columns, rows, **environment)
    lines = terminal.end()
    assert terminal.result == 0
    if environment:
        assert b"\x1b" not in terminal.written
        assert "".join(lines) == "step 1  " + "x" * 60
    else:
        assert lines == [("step 1  " + "x" * 60)[: columns - 1]]


def test_what_is_said_takes_the_place_of_a_line_of_progress() -> None:
    """A warning, an error or a result while one stands there; and none wraps, of whatever text."""
    code = """
progress = ui.Progress()
for words in ("step 1/2", "日本" * 30, "a  " * 9 + "日本" * 9):
    progress.update(words, "x")
    ui.warn("a library")
    progress.update(words)
    ui.report("found")
progress.clear()
progress.update("step 2/2")
"""
    assert start(code).end() == ["warning: a library", "found"] * 3 + ["step 2/2"]


def test_colours_are_left_out_where_nobody_wants_them() -> None:
    code = "step = 0\nscreen.show(draw)\nscreen.close()"
    assert b"\x1b[36m" in ended(start(code))
    assert b"\x1b[36m" not in ended(start(code, NO_COLOR="1"))
    texts = "ui.report_texts([('\x1b[1m', 'learnt')])"
    assert b"\x1b[1m" in ended(start(texts, NO_COLOR=""))
    assert b"\x1b" not in ended(start(texts, NO_COLOR="1"))
    assert b"\x1b" not in ended(start(texts, TERM="dumb"))


def ended(terminal: Terminal) -> bytes:
    terminal.end()
    return terminal.written


def test_other_encodings_have_twins_of_the_same_width() -> None:
    terminal = start("step = 0\nscreen.show(draw)\nui._region = None\n", PYTHONIOENCODING="ascii")
    lines = terminal.end()
    assert lines[3] == r"_=# *** \x1b[2J"
    assert lines[2] == ("step 0 " + r"\u65e5\u672c long " * 9)[:46] + "..."


def test_a_closed_terminal_ends_nothing(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    code = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nstep = 0\nscreen.show(draw){WAIT.format(str(go))}"
    code += "for step in range(50):\n  screen.show(draw)\n  ui.say('said')\nassert not screen.show(draw)\n"
    terminal = start(f"{code}open({str(done)!r}, 'w')")
    terminal.wait_for("title")
    terminal.close()
    go.touch()
    terminal.thread.join(60)
    assert done.is_file()


def test_a_halted_terminal_halts_nothing(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    code = f"step = 0\nscreen.show(draw){WAIT.format(str(go))}for step in range(100): screen.show(draw)\n"
    terminal = start(
        f"{code}open({str(done)!r}, 'w')\nstep = 7\nscreen.show(draw)\nui.say('end')\nui._region = None\n"
    )
    terminal.wait_for("title")
    terminal.type("\x13")  # Ctrl-S
    go.touch()
    until = time.monotonic() + 30
    while not done.is_file():
        assert time.monotonic() < until
        time.sleep(0.01)
    terminal.type("\x11")
    assert terminal.end() == ["end", *picture(7, 50)]
    assert len(terminal.frames()) < 10


def test_a_signal_may_speak_amid_a_drawing(tmp_path: Path) -> None:
    """Python refuses to write in a handler that comes amid a write to the same stream."""
    code = """
import io, signal
signal.signal(signal.SIGINT, lambda *_: ui.say("heard"))
step = 0
screen.show(draw)
class Interrupted(io.FileIO):
    def write(self, data):
        global left
        left -= 1
        if left == 0: signal.raise_signal(signal.SIGINT)
        return super().write(data)
left = 2
raw = Interrupted(2, "w", closefd=False)
ui._region.console.file = ui._region.stream = sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="twins", write_through=True)
for step in range(3): screen.show(draw)
assert left < 0
ui._region = None
"""
    terminal = start(code)
    assert terminal.end() == ["heard", *picture(2, 50)]
    assert terminal.result == 0


def test_a_program_in_the_background_draws_nothing_and_erases_nothing() -> None:
    code = """
step = 0
screen.show(draw)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    import signal
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(2, os.getpgrp())
    time.sleep(3)
    os._exit(0)
time.sleep(1)
print("$ typed", end="", flush=True)
assert not screen.show(draw)
ui.say(" said")
screen.close()
"""
    terminal = start(code)
    lines = terminal.end()
    assert lines[0] == "$ typed said"
    assert b"typed\x1b" not in terminal.written
