"""Make others' text fit to be shown: escaped, quoted for a shell, under the name that was given.
Standard library only."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import Path

HIDDEN = re.compile(
    "[\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e00ff]"
    # joiners belong to emoji and to scripts beyond ASCII; amid ASCII they hide
    "|(?<![^\0-\x7f])[\u200c\u200d]"
)
"""What a terminal obeys instead of showing it, or shows nothing of: controls, ends of lines, marks
that turn the direction of writing, invisible characters, halves of characters."""


def escape(text: str, keep: str = "") -> str:
    r"""Return a text with what it hides written out, `\x1b` or `\u202e`, but for the characters in
    `keep`: one line, unless that has \n in it."""
    return HIDDEN.sub(
        lambda found: (
            found[0] if found[0] in keep else found[0].encode("unicode_escape").decode("ascii")
        ),
        text,
    )


def count_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for a wide character, such as those
    of Chinese, none for a mark on the one before it."""
    return len(text) if text.isascii() else sum(map(_count_columns, text))


def _count_columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


_names: dict[str, str] = {}


def show_as(copy: Path, given: Path) -> None:
    """Let messages name `given` where they would name `copy`, which stands for it in this
    process."""
    _names[str(copy)] = str(given)


def name_given(text: str) -> str:
    """Return a text with the names that were given in place of their copies'."""
    for copy, given in _names.items():
        text = text.replace(copy, given)
    return text


def name_in_ollama(stem: str) -> str:
    """Return a name for the model of a GGUF file that Ollama takes: letters of ASCII, digits, dots,
    dashes and underscores, 80 at most, of which the first is no mark (types/model/name.go)."""
    spelt = re.sub(r"[^a-z0-9_.-]+", "-", stem.lower()).lstrip("_.-")
    return spelt[-80:].lstrip("_.-") or "model"


def quote(path: object) -> str:
    """Quote a path, or another value, for a command line that is shown: pasted into a shell it is
    one word, and no option."""
    text = name_given(str(path))
    return quote_words([f"./{text}" if text.startswith("-") else text])


def quote_words(words: Iterable[str]) -> str:
    """Quote each word of a command of ours, whose options stay options."""
    return " ".join(_quote_word(word) for word in words)


def _quote_word(word: str) -> str:
    r"""Quote a word as the shell's $'…' where it holds what cannot be shown, with each byte of that
    as `\033`."""
    if not HIDDEN.search(word):
        return shlex.quote(word)
    spelt = re.sub(r"[\\']", r"\\\g<0>", word)
    return f"$'{HIDDEN.sub(lambda found: _spell_bytes(found[0]), spelt)}'"


def _spell_bytes(character: str) -> str:
    is_byte = "\udc80" <= character <= "\udcff"  # of a file's name that is no text
    encoded = character.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in encoded)


def spell_count(number: int | str, thing: str, things: str | None = None) -> str:
    """Return a number, which may be spelt already, with what it is of: `1 row`, `2 rows`; `things`
    where that is not the first with an s, as of `row is` and `rows are`."""
    return f"{number} {thing if str(number) == '1' else things or f'{thing}s'}"
