"""Others' text as it is shown: one line that no terminal obeys, and one word of a real shell.

Hermetic: starts bash. Alone: pytest tests/common/test_shown.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from lora_cli.common import shown, spell_count
from lora_cli.common.shown import HIDDEN, escape, quote, quote_words

VISIBLE = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN"}
"""Scripts with signs that Unicode calls formats, and fonts draw."""
HOSTILE = (
    "my out; touch pwned", "$(touch pwned)", "`touch pwned`", "a'b\"c", "-rf", "--help", "a\nb; touch pwned",
    "\x1b[2J", "a\\nb'$(touch pwned)", "\u202etxt.exe", "!x", "~", "*", "a\tb", "名前", "👩‍🚀", "\udcff\udc80", "#x", "&",
)  # fmt: skip


def test_whatever_a_terminal_obeys_or_hides_is_written_out() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        kind = unicodedata.category(character)
        name = unicodedata.name(character, "?").split()[0]
        hides = kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and name not in VISIBLE)
        if hides and character not in "\u200c\u200d":
            assert escape(f"é{character}") != f"é{character}", hex(number)
            assert escape(f"a{character}").isprintable(), hex(number)
    assert escape("a\x1b[2J\nerror: \x85\u2028\u202e\ud800") == (
        r"a\x1b[2J\nerror: \x85\u2028\u202e\ud800"
    )
    assert escape("to\u200dken") == r"to\u200dken"
    assert escape("a\tb\n\x1b", keep="\n\t") == "a\tb\n\\x1b"


@pytest.mark.parametrize(
    "text", ["👨‍👩‍👧 ❤️‍🔥 1️⃣", "می‌خواهم", "שלום עולם", "مرحبا", "é ü 東京 क्‍ष", "a b"]
)
def test_writing_stays_readable(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_quoted_name_is_one_word_of_a_shell_and_no_option(name: str, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    made = tmp_path / name
    made.mkdir()
    command = f"rm -r {quote(name)}"
    assert not HIDDEN.search(command)
    done = subprocess.run([shutil.which("bash"), "-c", command], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    said = subprocess.run(
        ["bash", "-c", f"printf %s {quote_words(['--x', name])}"], capture_output=True
    )
    assert said.stdout == b"--x" + os.fsencode(name)


def test_a_copy_is_quoted_under_the_name_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_names", {"/tmp/copy": "my $(x)"})
    assert quote("/tmp/copy/a") == "'my $(x)/a'"


def test_one_is_one() -> None:
    assert [spell_count(number, "row") for number in (0, 1, 2, "1", "1,001")] == [
        "0 rows", "1 row", "2 rows", "1 row", "1,001 rows",
    ]  # fmt: skip
    assert spell_count(1, "row is", "rows are") == "1 row is"
    assert spell_count(21, "row is", "rows are") == "21 rows are"
