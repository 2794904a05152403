"""Read the rows of a JSON file: one a line, one list of them, objects over many lines, one object
that has the list, or SQuAD's texts with their questions.

What is no JSON, or gives a key two values, is a bad row that says where. What cannot be told is
refused with a command that makes lines of it: by Python, which is surely there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO, get_args

from lora_cli.common import LoraError, escape, quote_words, ui
from lora_cli.data import squad
from lora_cli.data.formats import COLUMN_SETS, FORMATS, BadRow, refuse_repeated
from lora_cli.data.json_text import (
    DECODE,
    LONGEST,
    SPACE,
    RepeatedKey,
    SeveralLists,
    Text,
    decode_value,
    parse,
    skip_space,
    walk_list,
    walk_member,
)
from lora_cli.data.text_files import BATCH, refuse_bomb, show_line, suggest_edit, walk_lines
from lora_cli.recipe import Column

Row = dict[str, Any] | BadRow
"""A row as it was read, or why it could not be read."""
Rows = Iterator[tuple[str, Row]]
Columns = Set[str]
"""Columns of theirs that the recipe or the command line names, without what is inside of them."""
OF_ROWS = (
    *FORMATS.values(),
    *(tuple(names.values()) for names in COLUMN_SETS),
    *(("chosen", "rejected"), ("tokens",), ("question", "context"), ("source", "target")),
)
"""Columns of rows: an object that has them is one, whatever lists it has besides."""
LISTS = {*get_args(Column)}
"""Columns, of which some have a list of mappings in a row, such as tools."""
OF_ITEMS = {"role", "from", "answer_start"}
"""Keys of turns and of answers, which a row has a list of."""
WORDS = {"input_ids", "tokens", "words"}
"""Columns of a row that have an item for each word, as those of a table have for each row."""
NAME_ROWS = ("rows", "data", "train", "examples", "instances")
"""Keys that rows mostly stand under."""
COMMENT = re.compile(r"//|/\*|#")
OF_LINES = r"/^[[:space:]]*(\/\/|#)/d"
OF_BLOCKS = r"s:^[[:space:]]*/\*[^*]*\*+([^/*][^*]*\*+)*/::; \:^[[:space:]]*/\*:,\:\*/:d; "
"""What sed does to leave out comments: lines of them, and those that end on their line or later."""
NEAR = 40
"""Characters that are shown on each side of a mistake in a long line."""


def read_json(file: Path, stream: TextIO, columns: Columns = frozenset()) -> Rows:
    """Yield the rows of a JSON file, each with its place; `columns` are those that were named: what
    has them is a row."""
    first = _read_filled(stream)
    second = "" if len(first) == LONGEST else _read_filled(stream)
    stream.seek(0)
    begins = first.lstrip()[:1]
    if begins == "[":
        yield from _walk_values(file, stream, _read_list)
    elif begins == "{" and squad.is_squad(stream):
        yield from _walk_values(file, stream, squad.read_questions)
    elif begins == "{" and _is_read_whole(file, first, second, columns):
        yield from _walk_values(file, stream, partial(_read_objects, columns=columns))
    else:
        for number, line in enumerate(walk_lines(file, stream), 1):
            if line.strip():
                yield f"{file}:{number}", parse_line(line, file)


def find_lists(file: Path, columns: Columns) -> list[str]:
    """Return the keys of the lists of rows in a JSON file that is one object which has them inside,
    as `read_json` reads it and the library `datasets` does not; none of another file."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        first, second = _read_filled(stream), _read_filled(stream)
        stream.seek(0)
        head = stream.read(LONGEST)
    whole = first.lstrip().startswith("{") and _is_read_whole(file, first, second, columns)
    return _find_lists(head, columns) if whole else []


def _read_filled(stream: TextIO) -> str:
    """Return the next line that is not blank; nothing where there is none."""
    lines = iter(lambda: stream.readline(LONGEST), "")
    return next((line for line in lines if line.strip()), "")


def _is_read_whole(file: Path, first: str, second: str, columns: Columns) -> bool:
    """Return whether the object that a file begins with goes on after its first filled line, or is
    all that the file has and no row: of JSON lines, one is a row."""
    try:
        value = parse(first.strip())
    except RepeatedKey:
        value = None
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(first.strip()) and not _is_cut_off(first, second)
        return len(first) == LONGEST or goes_on
    except (ValueError, RecursionError):
        return False
    if second or file.name.lower().removesuffix(".gz").endswith(".jsonl"):
        return False
    return bool(_find_lists(first, columns) or _explain_table(file, value, columns))


def _is_cut_off(first: str, second: str) -> bool:
    """Return whether a line that ends within an object is a row that lost its end: the next is one
    by itself, and does not stand in a list or under a key that the line ends with."""
    return not first.rstrip().endswith(("[", ":")) and isinstance(parse_line(second), dict)


def parse_line(line: str, file: Path | None = None) -> Row:
    """Return the row on a line of JSON, or why it cannot be used; `file` is the file that it is
    from, if it is from one."""
    try:
        value = parse(line.strip())
    except json.JSONDecodeError as error:
        return _explain_line(line.strip(), error, file)
    except RepeatedKey as repeated:
        return refuse_repeated(repeated)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        return BadRow(
            "JSON that cannot be read", f"JSON that cannot be read: {str(error).partition(';')[0]}"
        )
    return value if isinstance(value, dict) else _refuse_other(line.strip())


def _refuse_other(text: str) -> BadRow:
    said = f"the row is {text[:40]}, not a mapping of columns"
    return BadRow("a row is not a mapping", said)


def _explain_line(text: str, error: json.JSONDecodeError, file: Path | None) -> BadRow:
    """Return what is wrong with a line that is no JSON; with the command that mends such lines,
    where they have one fault that many files have."""
    at = f"column {error.colno}: invalid JSON: {error.msg}"
    if text == "{" and file is None:
        whole = _python("print(json.dumps(json.load(sys.stdin.buffer)))")
        return BadRow("one JSON object over many lines", hint=f"{whole} before it, for one object")
    if COMMENT.match(text):
        drop = quote_words(["sed", "-E", OF_BLOCKS * text.startswith("/*") + OF_LINES])
        return BadRow("a line is a comment", hint=suggest_edit(file, drop))
    if error.msg == "Extra data" and text[error.pos :].strip() == ",":
        drop = quote_words(["sed", "-E", "s/,[[:space:]]*$//"])
        return BadRow("a comma after the row", hint=suggest_edit(file, drop))
    if text.startswith("{'"):
        lines = "[print(json.dumps(ast.literal_eval(line))) for line in sys.stdin if line.strip()]"
        said = f"{at}: Python writes it so, and JSON does not"
        return BadRow("invalid JSON", said, suggest_edit(file, _python(lines, "ast")))
    return BadRow("invalid JSON", at)


def _python(code: str, *more: str) -> str:
    """Return a command that runs a line of Python on what it is given."""
    return quote_words(["python3", "-c", f"import {', '.join([*more, 'json', 'sys'])}; {code}"])


def _take(value: Any) -> Row:
    """Return a value of a list, or after another, as a row."""
    if isinstance(value, RepeatedKey):
        return refuse_repeated(value)
    return value if isinstance(value, dict) else _refuse_other(json.dumps(value))


def _read_list(file: Path, text: Text) -> Rows:
    """Yield the rows of one JSON list."""
    for number, value in enumerate(walk_list(text), 1):
        turns = _explain_turns(file, value) if number == 1 else None
        yield f"{file}, row {number}", turns or _take(value)
        if turns:
            return


def _explain_turns(file: Path, value: Any) -> BadRow | None:
    """Return why a list whose first value this is has no rows, where it has conversations, or the
    turns of one; with the command that makes rows of it."""
    is_turn = isinstance(value, dict) and value.keys() == {"role", "content"}
    first = value[0] if isinstance(value, list) and value else None
    if not is_turn and not (isinstance(first, dict) and "role" in first):
        return None
    chats = "[json.load(sys.stdin.buffer)]" if is_turn else "json.load(sys.stdin.buffer)"
    code = f'[print(json.dumps({{"messages": turns}})) for turns in {chats}]'
    what = "the turns of one conversation" if is_turn else "conversations, each a list of turns"
    return BadRow(f"the file is a list of {what}", hint=suggest_edit(file, _python(code)))


def _read_objects(file: Path, text: Text, columns: Columns) -> Rows:
    """Yield objects one after another, or the rows of the one list that the only object has."""
    at = skip_space(text, 0)
    keys = _find_lists(text.part, columns)
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RepeatedKey(twice)
    if len(keys) > 1:
        raise SeveralLists(*keys)
    for key in keys:
        _say_once(f"  {file}: its rows are those of its list {key}")
        for number, value in enumerate(walk_member(text, key, only=True), 1):
            yield f"{file}, row {number} of {key}", _take(value)
        return
    number = 0
    while text.part[at : at + 1]:
        number += 1
        value, at = decode_value(text, at)
        at = skip_space(text, at)
        is_alone = number == 1 and not text.part[at : at + 1]
        table = _explain_table(file, value, columns) if is_alone else None
        yield f"{file}, row {number}", table or _take(value)


@cache
def _say_once(text: str) -> None:
    ui.say(text)


def _find_lists(text: str, columns: Columns) -> list[str]:
    """Return the keys of lists of mappings in the object that a text begins with, as far as it
    goes; none of a row (`_is_row`)."""
    at, found, others = text.find("{") + 1, list[tuple[str, Any]](), dict[str, Any]()
    try:
        while True:
            key, at = DECODE(text, _pass(text, at))
            if not isinstance(key, str):
                break
            at = _pass(text, at, ":")
            if (
                text[at : at + 1] == "["
                and text[(inner := _pass(text, at, "[")) : inner + 1] == "{"
            ):
                found.append((key, DECODE(text, inner)[0]))
                _, at = DECODE(text, at)
            else:
                others[key], at = DECODE(text, at)
            at = _pass(text, at, ",")
    except (ValueError, RecursionError):
        pass  # the end of the object, of the text or of what is JSON: this goes by what came before
    return [] if _is_row(found, others, columns) else [key for key, _ in found]


def _is_row(lists: Sequence[tuple[str, Any]], others: Mapping[str, Any], columns: Columns) -> bool:
    """Return whether an object is a row: by its lists of mappings, each with its first, and by what
    it has besides. Columns that were named decide, where they are in one of the two; else a row
    has columns of rows, turns, answers, or texts beside lists that are not called as rows are."""
    keys = others.keys() | {key for key, _ in lists}
    in_lists = any(columns & first.keys() for _, first in lists)
    if bool(columns & keys) != in_lists:
        return not in_lists
    if any(key in LISTS or OF_ITEMS & first.keys() for key, first in lists):
        return True
    if any(keys.issuperset(names) for names in OF_ROWS):
        return True
    is_named = any(key in NAME_ROWS for key, _ in lists)
    return not is_named and any(isinstance(value, str) for value in others.values())


def _pass(text: str, at: int, sign: str = "") -> int:
    """Return the place of what comes next, or next after a sign. Raises ValueError for another."""
    at = SPACE.match(text, at).end()  # type: ignore[union-attr]
    if not sign:
        return at
    if text[at : at + 1] != sign:
        raise ValueError(f"no {sign}")
    return _pass(text, at + 1)


def _explain_table(file: Path, value: Any, columns: Columns) -> BadRow | None:
    """Return why the only value of a file is no row, where it is a table by its columns, or has
    rows by their names, which name no column of `columns`; with the command that makes lines."""
    if not isinstance(value, dict) or len(value) < 2:
        return None
    held = list(value.values())
    if all(isinstance(each, dict) for each in held):
        by_column = all(key.isdecimal() for key in held[0]) and not list(value)[0].isdecimal()
        cells = "zip(*map(dict.values, t.values()))" if by_column else ""
        if not cells and (
            columns & value.keys() or any(value.keys() >= {*names} for names in OF_ROWS)
        ):
            return None
    elif all(isinstance(each, list) and len(each) == len(held[0]) > 1 for each in held):
        if WORDS & value.keys() or not all(isinstance(each[0], str) for each in held):
            return None
        cells = "zip(*t.values())"
    else:
        return None
    rows = f"(dict(zip(t, cells)) for cells in {cells})" if cells else "t.values()"
    code = f"t = json.load(sys.stdin.buffer); [print(json.dumps(row)) for row in {rows}]"
    what = "columns, each with all its values" if cells else "rows by their names"
    return BadRow(f"the file is one object of {what}", hint=suggest_edit(file, _python(code)))


def _walk_values(file: Path, stream: TextIO, read_rows: Callable[[Path, Text], Rows]) -> Rows:
    """Yield the rows of one JSON value over the whole file, of which no more than some are held."""
    text = Text(stream)
    try:
        for number, row in enumerate(read_rows(file, text), 1):
            if number % BATCH == 0:
                refuse_bomb(file, stream)
            yield row
    except json.JSONDecodeError as error:
        line = text.line + error.lineno
        column = error.colno + (text.column if error.lineno == 1 else 0)
        said = f"{file}:{line}:{column}: invalid JSON: {error.msg}"
        shown = _show_line(file, line, column)
        if error.msg == "Expecting value" and text.part[error.pos : error.pos + 1] == "]":
            shown = f"leave out the comma before the ]: {shown}"
        raise LoraError(said, shown) from None
    except SeveralLists as several:
        said = f"{file} is one object with several lists of rows: {', '.join(several.keys)}"
        raise LoraError(said, _suggest_list(file, several.keys)) from None
    except RepeatedKey as repeated:
        said = f"{file}: {escape(repeated.key)} is given twice"
        raise LoraError(said, "leave one of the two out, or give it another name") from None
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]
        raise LoraError(
            f"{file}: JSON that cannot be read: {said}", "write one row per line"
        ) from None


def _suggest_list(file: Path, keys: Sequence[str]) -> str:
    """Return the command that makes lines of one of several lists: that which is likelier to hold
    rows to train on."""
    key = next((name for name in NAME_ROWS if name in keys), keys[0])
    rows = f"json.load(sys.stdin.buffer)[{json.dumps(key)}]"
    return suggest_edit(file, _python(f"[print(json.dumps(row)) for row in {rows}]"))


def _show_line(file: Path, line: int, column: int) -> str:
    """Return the command that shows where a mistake is."""
    show = show_line(file, line)
    return show if column < 4 * NEAR else f"{show} | cut -c {column - NEAR}-{column + NEAR}"
