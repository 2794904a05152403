"""Read the rows of one local file, each with its place; what cannot be read says where and why."""

from __future__ import annotations

import base64
import glob
import gzip
import re
import secrets
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.ipc

from lora_cli.common import LoraError, confined, plain_files, quote
from lora_cli.data import class_labels, json_rows, pictures, stores, tables
from lora_cli.data.class_labels import name_classes
from lora_cli.data.json_text import LONGEST
from lora_cli.data.text_files import refuse_no_rows, show_line, walk_lines
from lora_cli.recipe import Data

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(pictures.ENDINGS, "picture"),
}
"""How a file is read, by the end of its name."""
TABLES = [ending for ending, kind in KINDS.items() if kind != "picture"]
"""Those of files of rows."""
BATCH = 1000
"""Rows read at a time."""
LARGEST_TABLE, TABLE_RATIO = 2**26, 200
"""Bytes, over which what was packed may not be over so many times its file. Text has less room
(text_files.py): columns are packed better. 64 MiB of short rows are prepared in some 7 s."""
MOST_ROWS = 100_000
"""Rows, over which a file may not have more than it has bytes. Text has no row in one byte; 99,000
that are all the same are prepared in 3 to 5 s."""
SECONDS, MEMORY = 6.0, 2**30
"""Processor time and bytes for some rows of a Parquet or Arrow file."""
_reader = confined.Confined(Path(__file__).with_name("arrow_program.py"))

Row = json_rows.Row
"""A row as it was read, or why it could not be read."""


def guess_kind(file: Path) -> str | None:
    """Return how a file is read, by its name (also under .gz), or None."""
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return KINDS.get(name.suffix.lower())


def refuse_missing_files(data: Data) -> None:
    """Raise LoraError for the first file that `data` names and that is missing, before a model is
    loaded."""
    for field, name in list_named(data):
        if stores.is_address(name):
            refuse_address(field, name)
            continue
        if guess_kind(Path(name)) is None or glob.has_magic(name):
            continue  # a folder or a data set on the hub; a pattern
        if not Path(name).exists():
            raise missing_file(field, Path(name))


def list_named(data: Data) -> Iterator[tuple[str, str]]:
    """Yield the files, folders, addresses and data sets that `data` names, with their keys."""
    named = {"path": data.path, "eval_path": data.eval_path}
    named |= {f"mix.{number}.path": rows.path for number, rows in enumerate(data.mix or [])}
    for field, given in named.items():
        for name in [given] if isinstance(given, str) else given or []:
            yield field, name


def refuse_address(field: str, name: str) -> None:
    """Raise LoraError for an address that is not taken, or whose object is no file of rows."""
    stores.refuse_address(field, name)
    if not stores.is_pattern(name) and guess_kind(Path(stores.name_file(name))) is None:
        raise unknown_kind(field, name)


def unknown_kind(field: str, file: object) -> LoraError:
    """Return the error for a file that data.`field` names and whose name does not say how to read
    it."""
    return LoraError(
        f"data.{field}: {file} is not one of {', '.join(TABLES)}, with or without .gz",
        "a file of rows is JSON lines, JSON, CSV or Parquet, and its name says which",
    )


def missing_file(field: str, file: Path) -> LoraError:
    """Return the error for a file that data.`field` names and that is not there."""
    hint = plain_files.suggest_other(file)
    if field in ("path", "eval_path"):
        near = plain_files.find_near(file)
        hint = (
            f"--set data.{field}={quote(near)}"
            if near
            else f"put it there, or --set data.{field}=FILE"
        )
    return LoraError(f"data.{field}: {file} does not exist", hint)


class Place(str):
    """Where a row stands, as it is said, and the file that it is from."""

    file: Path

    def suggest_command(self) -> str | None:
        """Return the command that shows the row, if it is a line of its file."""
        found = re.fullmatch(re.escape(f"{self.file}:") + r"(\d+)", self)
        return show_line(self.file, int(found[1])) if found else None


def read(file: Path, columns: json_rows.Columns = frozenset()) -> Iterator[tuple[str, Row]]:
    """Yield the rows of one file, each with its Place; `columns` are those that were named, by
    which a JSON file's rows are found. Raises LoraError for more of them than it has bytes."""
    plain_files.refuse_odd(file, file.stat())
    for number, (said, row) in enumerate(_read(file, columns), 1):
        if number % BATCH == 0:
            _refuse_row_count(file, number)
        place = Place(said)
        place.file = file
        yield place, row


def read_class_names(file: Path) -> class_labels.Names:
    """Return the names of classes that a file of rows has beside its columns."""
    kind, key = guess_kind(file), secrets.token_hex()
    if kind not in ("parquet", "arrow"):
        return {}
    try:
        _, _, described = _ask_reader(file, kind, "open", key, str(file), kind)
    finally:
        _ask_reader(file, kind, "close", key)
    return class_labels.read_names(described)


def read_lines(lines: BinaryIO, name: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of JSON lines that come by a pipe, as each comes, with its place in `name`.
    Raises LoraError for a line that is too long, or no UTF-8."""
    for number in count(1):
        line = lines.readline(LONGEST + 1)
        if not line:
            return
        place = f"{name}:{number}"
        if len(line) > LONGEST:
            raise LoraError(f"{place}: a line of over {LONGEST:,} bytes", "write it as several")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            said = f"{place}: byte {error.start + 1} is not UTF-8 ({line[error.start]:#04x})"
            raise LoraError(said, "iconv -t UTF-8 before it") from None
        if text.strip():
            yield place, json_rows.parse_line(text)


def _refuse_row_count(file: Path, count: int) -> None:
    """Raise LoraError for a packed file of very many rows for its size: each takes time, whatever
    is in it."""
    most = max(MOST_ROWS, file.stat().st_size)
    if count > most:
        raise LoraError(
            f"{file} has over {most:,} rows in {file.stat().st_size:,} bytes",
            "they are the same many times: leave all but some out",
        )


def _read(file: Path, columns: json_rows.Columns) -> Iterator[tuple[str, Row]]:
    how = guess_kind(file)
    if how == "picture":
        yield str(file), {"image": file.name, "label": file.parent.name}
        return
    refuse_no_rows(file, is_text=how == "text")
    if how in ("parquet", "arrow"):
        yield from _read_arrow(file, str(how))
        return
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        try:
            with opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
                yield from _read_text(file, str(how), stream, columns)
        except UnicodeDecodeError:
            with opened(file, "rb") as raw:  # which may be damaged further on as well
                raise _find_bad_byte(file, raw) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LoraError(
            f"{file} is a truncated or damaged gzip file: {error}", f"gzip -t {quote(file)}"
        ) from None


def _read_text(
    file: Path, how: str, stream: TextIO, columns: json_rows.Columns
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a text file."""
    if how == "csv":
        yield from tables.read_table(file, walk_lines(file, stream))
    elif how == "text":
        lines = enumerate(walk_lines(file, stream), 1)
        texts = ((number, line.rstrip("\r\n")) for number, line in lines)
        yield from ((f"{file}:{number}", {"text": text}) for number, text in texts if text.strip())
    else:
        yield from json_rows.read_json(file, stream, columns)


def _find_bad_byte(file: Path, raw: Any) -> LoraError:
    """Return the error for the first byte that is not UTF-8."""
    start = b""
    for number, line in enumerate(iter(lambda: raw.readline(LONGEST), b""), 1):
        start = start or line[:2]
        try:
            line.decode()
        except UnicodeDecodeError as error:
            said = (
                f"{file}:{number}: byte {error.start + 1} is not UTF-8 ({line[error.start]:#04x})"
            )
            return LoraError(said, tables.suggest_conversion(file, _guess_encoding(start, line)))
    raise AssertionError("it was read as UTF-8 and refused")


def _guess_encoding(start: bytes, line: bytes) -> str:
    """Return the likeliest encoding of a file that begins with the two bytes `start`, and of which
    a line is not UTF-8."""
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if re.fullmatch(rb"\0[!-~]|[!-~]\0", start):
        return "UTF-16BE" if start.startswith(b"\0") else "UTF-16LE"
    # Windows' own has quotation marks and dashes where Latin-1 has control characters
    return "CP1252" if re.search(rb"[\x80-\x9f]", line) else "LATIN1"


def _read_arrow(file: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a Parquet or Arrow file, decoded in a process with limits: a page of some
    bytes may stand for any number of rows."""
    key, number, unpacked = secrets.token_hex(), 0, 0
    most = max(LARGEST_TABLE, TABLE_RATIO * file.stat().st_size)
    try:
        names, count, described = _ask_reader(file, kind, "open", key, str(file), kind)
        classes = class_labels.read_names(described)
        tables.refuse_equal_names(file, names)
        _refuse_row_count(file, count)
        while answer := _ask_reader(file, kind, "next", key):
            unpacked += answer[0]
            if unpacked > most:
                raise LoraError(
                    f"{file} unpacks to over {most >> 20:,} MiB, {TABLE_RATIO} times its size",
                    "if it is what it should be, write it as JSON lines",
                )
            for batch in pyarrow.ipc.open_stream(base64.b64decode(answer[1])):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", name_classes(drop_nulls(row), classes)
    finally:
        _ask_reader(file, kind, "close", key)


def _ask_reader(file: Path, kind: str, *job: str) -> Any:
    try:
        [answer] = _reader.run(confined.Budget(SECONDS, MEMORY), None, [job])
    except confined.Stopped as stopped:
        most = {"memory": f"over {MEMORY >> 20} MiB", "time": f"over {SECONDS:g} s"}
        raise LoraError(
            f"{file}: some rows of it need {most.get(stopped.why, stopped.why)} to read",
            "write them as JSON lines, or smaller",
        ) from None
    if isinstance(answer, dict):
        raise LoraError(
            f"{file} is not a readable {kind} file: {answer['refused']}", f"ls -l {quote(file)}"
        )
    return answer


def drop_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without nulls inside its values: a table gives each mapping in a column the
    keys of all of them."""
    return {name: _drop_nulls_inside(value) for name, value in row.items()}


def _drop_nulls_inside(value: Any) -> Any:
    """Return a value without nulls in its mappings, at any depth."""
    if isinstance(value, dict):
        return {key: _drop_nulls_inside(inner) for key, inner in value.items() if inner is not None}
    # the first item tells of them all: a long list of numbers is not walked
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_drop_nulls_inside(inner) for inner in value]
    return value
