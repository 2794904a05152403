"""All that is printed goes through ui: lines stay lines, any encoding takes any text, streams that
fail or are closed end nothing.

Hermetic. Alone: pytest tests/common/test_ui.py
"""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.common import ui

ROOT = Path(__file__).parent.parent.parent
MARKS = "⟦answer⟧ |Δlogit| 3 × 4 … 東 🙂"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"[[answer]] |delta logit| 3 x 4 ... \u6771 \U0001f642"),
        ("cp1252", r"[[answer]] |delta logit| 3 × 4 … \u6771 \U0001f642"),
        ("utf-8", MARKS),
    ],
)
def test_marks_have_twins_and_the_rest_is_escaped(encoding: str, shown: str) -> None:
    code = f"import sys\nfrom lora_cli.common import streams, ui\nstreams.open_streams()\nui.report({MARKS!r})\nui.say({MARKS!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.decode(encoding).rstrip() == shown
    assert done.stderr.decode(encoding).rstrip() == shown


def test_check_shows_its_rows(lora, write_recipe) -> None:
    done = lora("check", write_recipe(), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "[[" in done.stdout


def shown(call: str, **given: str) -> str:
    """What a program that makes this call of ui prints, stdout and stderr as one."""
    code = f"from lora_cli.common import streams, ui\nstreams.open_streams()\n{call}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **given},
    )
    return done.stdout.decode()


FORGED = r"x\n\x1b[2Jerror: lost"


def test_a_line_is_one_line_whoever_wrote_what_is_in_it() -> None:
    assert shown("ui.say('x\\n\\x1b[2Jerror: lost', '', 'y')") == f"{FORGED}\n\ny\n"
    assert shown("ui.warn('x\\n\\x1b[2Jerror: lost')") == f"warning: {FORGED}\n"
    assert shown("ui.report('x\\n\\x1b[2Jerror: lost', 'y')") == f"{FORGED}\ny\n"
    assert shown("ui.Progress().update('x\\n\\x1b[2Jerror: lost', 'y')") == f"{FORGED}  y\n"
    table = shown("ui.report(*ui.format_table(['a'], [['x\\n']]))")
    assert table == "a\n---\nx\\n\n"


def test_columns_stand_below_each_other_whatever_is_in_them() -> None:
    rows = [["好评", "1.5"], ["e\u0301", "10"], ["plain", "好"]]
    table = ui.format_table(["label", "n"], rows)
    assert table[1:] == ["-----  ---", "好评   1.5", "e\u0301       10", "plain   好"]


def test_a_text_keeps_its_lines_and_tabs_and_an_answer_too() -> None:
    assert shown("ui.report_texts([('', 'a\\n\\tb\\x1b'), ('', 'c')])") == "  a\n  \tb\\x1bc\n"
    pieces = ["so\n", "\x1b", "[2J\tb ", "hf_abcdefgh", "ijklmnopqrst", "uv end"]
    call = f"answer = ui.Answer()\nfor each in {pieces!r}: answer.add(each)\nanswer.end()"
    assert shown(call) == "so\n\\x1b[2J\tb *** end\n"
    pieces = ["می", "\u200cخو ", "👩", "\u200d", "💻", "a", "\u200d", " é", "\u202e"]
    call = f"answer = ui.Answer()\nfor each in {pieces!r}: answer.add(each)\nanswer.end()"
    assert shown(call) == "می\u200cخو 👩\u200d💻a\\u200d é\\u202e\n"


def test_json_stays_json_of_the_same_data() -> None:
    data = {"a\u202e": ["\x85\x1b\n", "東", "\U000e0041", "hf_abcdefghijklmnopqrst", 1.5, None]}
    for encoding in ("utf-8", "ascii"):
        line = shown(f"ui.report_json({data!r})", PYTHONIOENCODING=encoding)
        assert line.rstrip("\n").isprintable()
        assert json.loads(line) == {"a\u202e": [*data["a\u202e"][:3], "***", 1.5, None]}


def test_a_result_s_path_is_there_for_a_program_byte_for_byte() -> None:
    call = "from pathlib import Path\nui.report_path(Path('a\\n\\x1b é'))"
    assert shown(call, PYTHONIOENCODING="ascii") == "a\n\x1b é\n"


def test_prose_that_cannot_be_written_ends_nothing() -> None:
    code = "from lora_cli.common import streams, ui\nstreams.open_streams()\nui.say('x')\nui.say('y')\nui.report('done')"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, cwd=ROOT
        )
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_what_a_library_writes_past_python_is_not_seen_while_it_is_silenced() -> None:
    """Also one in the other, and where an exception ends it."""
    code = """
import os, sys
from lora_cli.common import streams, ui

def speak(name):
    os.write(2, b"a library\\n")
    ui.say(name)
    print("printed", file=sys.stderr)

before = sys.stderr, len(os.listdir("/dev/fd"))
for outer in range(2):
    try:
        with streams.silence_libraries():
            speak("outer")
            with streams.silence_libraries():
                speak("inner")
            speak("outer")
            raise KeyError
    except KeyError:
        pass
assert before == (sys.stderr, len(os.listdir("/dev/fd")))
speak("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = ["outer", "printed", "inner", "printed", "outer", "printed"] * 2
    assert done.stderr.splitlines() == [*said, "a library", "after", "printed"]


@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_place_for_other_files(closed: str, tmp_path: Path) -> None:
    code = (
        "from lora_cli.common import streams, ui\nstreams.open_streams()\nui.say('x')\nimport os\n"
        f"assert os.open({str(tmp_path / 'f')!r}, os.O_CREAT) > 2"
    )
    words = f"{sys.executable} -c {shlex.quote(code)} {closed}"
    assert subprocess.run(["bash", "-c", words], cwd=ROOT).returncode == 0


def test_a_program_in_the_background_draws_no_line(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    code = "from lora_cli.common import streams, ui\nstreams.open_streams()\nui.Progress().update('a\\x1bb')"
    command = f"{sys.executable} -c {shlex.quote(code)}"
    for words, drawn in ((command, True), (f"set -m; {command} & wait", False)):
        child, terminal = pty.fork()
        if child == 0:
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execvp("bash", ["bash", "-c", words])
        said = b""
        try:
            while piece := os.read(terminal, 1000):
                said += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        os.waitpid(child, 0)
        assert (b"\x1b[J" in said) == drawn
        assert b"a\\x1bb" in said
