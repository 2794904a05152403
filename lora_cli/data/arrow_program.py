"""Read Parquet and Arrow files some rows at a time: the program that `readers.py` runs in a process
of its own. pyarrow and the standard library only."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others set a gigabyte aside
os.environ["OMP_NUM_THREADS"] = os.environ["ARROW_IO_THREADS"] = "1"  # each takes room of its own

import pyarrow
from pyarrow import ipc, parquet

BATCH = 100
"""Rows read at a time."""
LARGE = 5
"""The same of rows with binary values, such as pictures."""
DESCRIPTION = b"huggingface"
"""Under which `datasets` describes the columns."""
_reading: dict[str, Iterator[pyarrow.RecordBatch]] = {}


def handle(shared: None, job: list[str]) -> Any:
    """`open KEY PATH KIND` returns the names of the columns, how many rows the file says it has, 0
    where it does not, and what `datasets` says of the columns, if it does; `next KEY` how many
    bytes the next rows have as values, and a stream of Arrow's with them in base64, or None after
    the last; `close KEY`, nothing. `{"refused": …}` is why a file cannot be read."""
    what, key, *rest = job
    try:
        if what == "open":
            names, count, schema, _reading[key] = _open(*rest)
            described = (schema.metadata or {}).get(DESCRIPTION)
            return names, count, described and described.decode(errors="replace")
        if what == "close":
            _reading.pop(key, None)
            return None
        batch = next(_reading[key], None)
        if batch is None:
            return None
        packed = _write(batch)
        return _measure(batch.to_pylist()), base64.b64encode(packed).decode()
    except (pyarrow.ArrowInvalid, OSError) as error:
        return {"refused": " ".join(str(error).split())[:200]}


def _open(
    path: str, kind: str
) -> tuple[list[str], int, pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    if kind == "parquet":
        table = parquet.ParquetFile(path)
        schema = table.schema_arrow
        batches = table.iter_batches(_choose_size(schema), use_threads=False)
        return schema.names, table.metadata.num_rows, schema, batches
    with open(path, "rb") as stream:  # noqa: PTH123
        whole = stream.read(6) == b"ARROW1"
    reader = ipc.open_file(path) if whole else ipc.open_stream(path)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
    size = _choose_size(reader.schema)
    return (
        [],
        0,
        reader.schema,
        (batch.slice(start, size) for batch in batches for start in range(0, len(batch), size)),
    )


def _choose_size(schema: pyarrow.Schema) -> int:
    """Return how many rows of such columns are read at a time."""
    kinds = [inner.type for field in schema for inner in (field, *field.flatten())]
    binary = any(map(pyarrow.types.is_binary, kinds)) or any(
        map(pyarrow.types.is_large_binary, kinds)
    )
    return LARGE if binary else BATCH


def _write(batch: pyarrow.RecordBatch) -> bytes:
    # or a damaged file's offsets lead outside its buffers, and the process crashes
    batch.validate(full=True)
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _measure(value: Any) -> int:
    """Return the bytes of what is in a value, each time it is there: a file may hold it once and
    name it many times."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_measure, value.values()))
    if isinstance(value, (list, tuple)):
        inner = (each for each in value if isinstance(each, (str, bytes, dict, list, tuple)))
        return 8 * len(value) + sum(map(_measure, inner))
    return 8
