"""Read the rows of one local file, each with its place; what cannot be read says where and why."""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from lora_cli.common import LoraError, quote
from lora_cli.data import tables
from lora_cli.data.formats import BadRow
from lora_cli.recipe import Data

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""How a file is read, by the end of its name."""
BATCH = 1000
"""Rows read at a time."""

Row = dict[str, Any] | BadRow
"""A row as it was read, or why it could not be read."""


def guess_kind(file: Path) -> str | None:
    """Return how a file is read, by its name (also under .gz), or None."""
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return KINDS.get(name.suffix.lower())


def refuse_missing_files(data: Data) -> None:
    """Raise LoraError for the first file that `data` names and that is missing, before a model is
    loaded."""
    named = {"path": data.path, "eval_path": data.eval_path}
    named |= {f"mix.{number}.path": rows.path for number, rows in enumerate(data.mix or [])}
    for field, given in named.items():
        for name in [given] if isinstance(given, str) else given or []:
            if guess_kind(Path(name)) is None or "://" in name or glob.has_magic(name):
                continue  # a folder or a data set on the hub; an address; a pattern
            if not Path(name).exists():
                raise missing_file(field, Path(name))


def missing_file(field: str, file: Path) -> LoraError:
    """Return the error for a file that data.`field` names and that is not there."""
    can_be_set = field in ("path", "eval_path")
    hint = f"put it there, or --set data.{field}=FILE" if can_be_set else f"ls {quote(file.parent)}"
    return LoraError(f"data.{field}: {file} does not exist", hint)


def read(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of one file, each with its place."""
    how = guess_kind(file)
    if how in ("parquet", "arrow"):
        yield from _read_arrow(file, str(how))
        return
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        try:
            with opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
                yield from _read_text(file, str(how), stream)
        except UnicodeDecodeError:
            with opened(file, "rb") as raw:  # which may be damaged further on as well
                raise _find_bad_byte(file, raw) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LoraError(
            f"{file} is a truncated or damaged gzip file: {error}", f"gzip -t {quote(file)}"
        ) from None


def _read_text(file: Path, how: str, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a text file."""
    if how == "csv":
        yield from tables.read_table(file, stream)
    elif how == "text":
        lines = (
            (number, line.rstrip("\r\n")) for number, line in enumerate(stream, 1) if line.strip()
        )
        yield from ((f"{file}:{number}", {"text": line}) for number, line in lines)
    else:
        yield from _read_json(file, stream)


def _find_bad_byte(file: Path, raw: Iterable[bytes]) -> LoraError:
    """Return the error for the first byte that is not UTF-8."""
    start = b""
    for number, line in enumerate(raw, 1):
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


def _read_json(file: Path, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """Yield JSON rows: one per line, or one list of them."""
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    if first.lstrip().startswith("["):
        yield from _read_json_list(file, first + stream.read())
        return
    stream.seek(0)
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield f"{file}:{number}", _parse_line(line, number == 1)


def _parse_line(line: str, first: bool) -> Row:
    """Return the row on a line of JSON, or why it cannot be used."""
    try:
        value = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        if first and line.strip() == "{":
            return BadRow(
                "one JSON object over many lines",
                hint="write one row per line, or one list of rows: jq -c . FILE",
            )
        return BadRow("invalid JSON", f"column {error.colno}: invalid JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        return BadRow(
            "JSON that cannot be read", f"JSON that cannot be read: {str(error).partition(';')[0]}"
        )
    if not isinstance(value, dict):
        return BadRow(
            "a row is not a mapping", f"the row is {line.strip()[:40]}, not a mapping of columns"
        )
    return value


def _read_json_list(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of one JSON list."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(
            f"{file}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}", f"jq . {quote(file)}"
        ) from None
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]
        raise LoraError(
            f"{file}: JSON that cannot be read: {said}", "write one row per line"
        ) from None
    for number, value in enumerate(values, 1):
        place = f"{file}, row {number}"
        if isinstance(value, dict):
            yield place, value
        else:
            shown = json.dumps(value)[:40]
            bad = BadRow("a row is not a mapping", f"the row is {shown}, not a mapping of columns")
            yield place, bad


def _read_arrow(file: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a Parquet or Arrow file."""
    from pyarrow import ipc, parquet

    try:
        if kind == "parquet":
            table = parquet.ParquetFile(file)
            tables.refuse_equal_names(file, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=BATCH)
        else:
            with file.open("rb") as stream:
                whole = stream.read(6) == b"ARROW1"
            reader = ipc.open_file(file) if whole else ipc.open_stream(file)
            batches = (
                (reader.get_batch(index) for index in range(reader.num_record_batches))
                if whole
                else iter(reader)
            )
        number = 0
        for batch in batches:
            # or a damaged file's offsets lead outside its buffers, and the process crashes
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", drop_nulls(row)
    except pyarrow.ArrowInvalid as error:
        raise LoraError(
            f"{file} is not a readable {kind} file: {' '.join(str(error).split())[:200]}",
            f"ls -l {quote(file)}",
        ) from None


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
