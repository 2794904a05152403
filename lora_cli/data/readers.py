"""The rows of one local file, each with the place it stands at; what cannot be read says where and
why."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from lora_cli.common import LoraError
from lora_cli.data.formats import BadRow
from lora_cli.recipe import Data

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
BATCH = 1000

Row = dict[str, Any] | BadRow
"""A row as it was read, or why it could not be."""


def guess_kind(file: Path) -> str | None:
    """How a file is read, told by its name, also under .gz."""
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return KINDS.get(name.suffix.lower())


def refuse_missing_files(data: Data) -> None:
    """LoraError for the first file that `data` names and that is missing, before a model is
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
    """The error for a file that data.`field` names and that is not there."""
    can_be_set = field in ("path", "eval_path")
    hint = f"put it there, or --set data.{field}=FILE" if can_be_set else f"ls {file.parent}"
    return LoraError(f"data.{field}: {file} does not exist", hint)


def read(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of one file, each with its place."""
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
        raise LoraError(f"{file} is no whole gzip file: {error}", f"gzip -t {file}") from None


def _read_text(file: Path, how: str, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """The rows of a file of text."""
    if how == "csv":
        yield from _read_csv(file, stream)
    elif how == "text":
        lines = (
            (number, line.rstrip("\r\n")) for number, line in enumerate(stream, 1) if line.strip()
        )
        yield from ((f"{file}:{number}", {"text": line}) for number, line in lines)
    else:
        yield from _read_json(file, stream)


def _find_bad_byte(file: Path, raw: Iterable[bytes]) -> LoraError:
    """Where the first byte stands that is no UTF-8."""
    for number, line in enumerate(raw, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            said = (
                f"{file}:{number}: byte {error.start + 1} is not UTF-8 ({line[error.start]:#04x})"
            )
            encoding = "UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
            return LoraError(said, f"iconv -f {encoding} -t UTF-8 {file}")
    raise AssertionError("it was read as UTF-8 and refused")


def _read_json(file: Path, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """JSON rows, one a line; or one list of them."""
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
    try:
        value = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        if first and line.strip() == "{":
            return BadRow(
                "one JSON object over many lines",
                hint="one row a line, or one list of rows: jq -c . FILE",
            )
        return BadRow("invalid JSON", f"column {error.colno}: invalid JSON: {error.msg}")
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits; thousands of brackets
        return BadRow(
            "JSON that cannot be read", f"JSON that cannot be read: {str(error).partition(';')[0]}"
        )
    if not isinstance(value, dict):
        return BadRow(
            "a row is no mapping", f"the row is {line.strip()[:40]}, not a mapping of columns"
        )
    return value


def _read_json_list(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(
            f"{file}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}", f"jq . {file}"
        ) from None
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]
        raise LoraError(
            f"{file}: JSON that cannot be read: {said}", "one row a line is read row by row"
        ) from None
    for number, value in enumerate(values, 1):
        place = f"{file}, row {number}"
        yield (
            place,
            value
            if isinstance(value, dict)
            else BadRow(
                "a row is no mapping", f"it is {json.dumps(value)[:40]}, not a mapping of columns"
            ),
        )


def _read_csv(file: Path, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """Rows under a header line; separated by whichever of comma, tabulator and semicolon stands in
    it most often."""
    csv.field_size_limit(1 << 30)
    first = stream.readline()
    rows = csv.reader(chain([first], stream), delimiter=max(",\t;", key=first.count), strict=True)
    try:
        header = next(rows)
        _refuse_twice(file, header)
        for values in rows:
            if not values:
                continue
            if len(values) != len(header):
                yield (
                    f"{file}:{rows.line_num}",
                    BadRow(
                        "another number of columns",
                        f"{len(values)} columns, but the header has {len(header)}",
                    ),
                )
            else:
                yield f"{file}:{rows.line_num}", dict(zip(header, values))
    except csv.Error as error:
        raise LoraError(
            f"{file}:{rows.line_num}: invalid CSV: {error}", f"sed -n {rows.line_num}p {file}"
        ) from None


def _refuse_twice(file: Path, columns: list[str]) -> None:
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise LoraError(f"{file} has two columns {twice[0]}", "rename one of them")


def _read_arrow(file: Path, kind: str) -> Iterator[tuple[str, Row]]:
    from pyarrow import ipc, parquet

    try:
        if kind == "parquet":
            table = parquet.ParquetFile(file)
            _refuse_twice(file, table.schema_arrow.names)
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
            batch.validate(
                full=True
            )  # or a damaged file's offsets lead outside its buffers, and the process crashes
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", drop_nulls(row)
    except pyarrow.ArrowInvalid as error:
        raise LoraError(
            f"{file} is no {kind} file: {' '.join(str(error).split())[:200]}", f"ls -l {file}"
        ) from None


def drop_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without nulls inside its values: a table gives each mapping in a column the keys of
    all of them."""
    return {name: _dense(value) for name, value in row.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(inner) for key, inner in value.items() if inner is not None}
    return (
        [_dense(inner) for inner in value]
        if isinstance(value, list) and value and not _flat(value[0])
        else value
    )


def _flat(value: Any) -> bool:
    return not isinstance(value, (dict, list))
