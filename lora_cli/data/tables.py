"""Read the rows of a table in a text file: CSV, by whatever separator its first line shows.

What is not as the file's name says is read as it was meant and said, once: another separator, names
with spaces around them, columns without a name. What cannot be told is refused, with a command that
mends the file.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, quote, spell_count, ui
from lora_cli.data.formats import FORMATS, BadRow, Formats
from lora_cli.data.text_files import is_fetched, suggest_edit

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
"""What may stand between two columns, in words; the earlier one where a first line has as many."""
NAMES = {1: ("text",), 2: ("prompt", "completion"), 3: ("instruction", "input", "output")}
"""The columns that a table without names most likely has, by their number, where texts are learnt
to be written."""
LONGEST_NAME = 40
LONGEST = 2**22
"""Characters of a value, which may have many lines."""
MOST = 10_000
"""Columns of a table."""


def read_table(file: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield the rows under a line of names, each with its place."""
    csv.field_size_limit(LONGEST)
    before, first = 0, next(lines, "")
    given = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)  # Excel's
    if given:
        before, first = 1, next(lines, "")
    separator = given[1] if given else _find_separator(file, first)
    spaced = re.search(rf"{re.escape(separator)} +\S", first) is not None
    rows = csv.reader(
        chain([first], lines), delimiter=separator, skipinitialspace=spaced, strict=True
    )
    try:
        header = [name.strip() for name in next(rows, [])]
        _refuse_strange_names(file, header)
        _say_what_is_read(file, separator, header)
        for values in rows:
            if values:
                yield f"{file}:{rows.line_num + before}", _name_values(header, values)
    except csv.Error as error:
        line = rows.line_num + before
        raise LoraError(
            f"{file}:{line}: invalid CSV: {error}", f"sed -n {line}p {quote(file)}"
        ) from None


def _name_values(header: list[str], values: list[str]) -> dict[str, Any] | BadRow:
    """Return the values by the names of their columns, without those of columns without a name."""
    if len(values) != len(header):
        return BadRow(
            "the number of columns differs from the header's",
            f"{spell_count(len(values), 'column')}, but the header has {len(header)}",
        )
    return {name: value for name, value in zip(header, values) if name}


def _find_separator(file: Path, first: str) -> str:
    """Return the separator that makes the most columns of a first line; where several make as many,
    the one that the file's name says."""
    return max([_find_own_separator(file), *SEPARATORS], key=lambda each: _count(first, each))


def _count(first: str, separator: str) -> int:
    """Return how many columns a first line has by a separator; none where quotes end elsewhere."""
    try:
        return len(next(csv.reader([first], delimiter=separator, strict=True), []))
    except csv.Error:
        return 0


def _find_own_separator(file: Path) -> str:
    return "\t" if ".tsv" in [suffix.lower() for suffix in file.suffixes] else ","


def _refuse_strange_names(file: Path, header: list[str]) -> None:
    """Raise LoraError where names are of another encoding, or two are alike."""
    if any("\0" in name for name in header):
        raise LoraError(
            f"{file}: its first line has NUL bytes, as text in UTF-16 has",
            suggest_conversion(file, "UTF-16LE"),
        )
    refuse_equal_names(file, [name for name in header if name])


def find_lack_of_names(
    files: list[Path], columns: list[str], known: Formats = FORMATS
) -> LoraError | None:
    """Return the error for a table whose first line is a row, where what stands for the names of
    its `columns`, which are none of the `known` formats', looks like text; else None."""
    strange = [name for name in columns if _looks_like_text(name)]
    if not strange or not files or {".csv", ".tsv"}.isdisjoint(files[0].suffixes):
        return None
    with files[0].open(encoding="utf-8-sig", newline="", errors="replace") as stream:
        separator = _find_separator(files[0], stream.readline(LONGEST))
    return LoraError(
        f"{files[0]}: the first line must name the columns, and {strange[0][:LONGEST_NAME]!r} "
        "looks like a row's",
        _suggest_header(files[0], _name_likely(len(columns), known), separator),
    )


def _name_likely(columns: int, known: Formats) -> Sequence[str]:
    """Return what so many columns are most likely called; nothing where that is not known."""
    if known is FORMATS:
        return NAMES.get(columns, ())
    return next((needed for needed in known.values() if len(needed) == columns), ())


def _suggest_header(file: Path, likely: Sequence[str], separator: str) -> str:
    """Return the command that puts a line of the likeliest names above the rows, where there is
    one."""
    names = separator.join(likely)
    if not names or file.suffix.lower() == ".gz" or is_fetched(file):
        return "write a line of names above the rows"
    return f"sed -i {quote(f'1i {names}')} {quote(file)}"


def _looks_like_text(name: str) -> bool:
    """Return whether it is no name: long, a sentence, or a number."""
    return bool(
        len(name) > LONGEST_NAME
        or len(name.split()) > 3
        or re.search(r"[.?!:]$", name)
        or re.fullmatch(r"-?[\d.]+", name)
    )


def refuse_equal_names(file: Path, columns: list[str]) -> None:
    """Raise LoraError where two columns have one name, or there are over MOST."""
    if len(columns) > MOST:
        raise LoraError(
            f"{file} has {spell_count(format(len(columns), ','), 'column')}",
            f"leave out all but {MOST:,}",
        )
    if twice := sorted(name for name, times in Counter(columns).items() if times > 1):
        raise LoraError(f"{file} has two columns named {twice[0]}", "rename one of them")


def _say_what_is_read(file: Path, separator: str, header: list[str]) -> None:
    """Say what is not as the file's name says."""
    said = []
    if separator != _find_own_separator(file) and len(header) > 1:
        said.append(f"columns are separated by {SEPARATORS.get(separator, repr(separator))}")
    if "" in header:
        said.append(
            f"{header.count('')} of {spell_count(len(header), 'column')} "
            f"{'has no name and is' if header.count('') == 1 else 'have no name and are'} left out"
        )
    if said:
        _say_once(f"  {file}: {', and '.join(said)}")


@cache
def _say_once(text: str) -> None:
    ui.say(text)


def suggest_conversion(file: Path, encoding: str) -> str:
    """Return the hint that makes a file of UTF-8 from one in another encoding."""
    return suggest_edit(file, f"iconv -f {encoding} -t UTF-8", prefix="utf8-")
