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
_reading: dict[str, Iterator[pyarrow.RecordBatch]] = {}


def handle(shared: None, job: list[str]) -> Any:
    """`open KEY PATH KIND` returns the names of the columns and how many rows the file says it has,
    0 where it does not; `next KEY` how many bytes the next rows have as values, and a stream of
    Arrow's with them in base64, or None after the last; `close KEY`, nothing. `{"refused": …}` is
    why a file cannot be read."""
    what, key, *rest = job
    try:
        if what == "open":
            names, count, _reading[key] = _open(*rest)
            return names, count
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


def _open(path: str, kind: str) -> tuple[list[str], int, Iterator[pyarrow.RecordBatch]]:
    if kind == "parquet":
        table = parquet.ParquetFile(path)
        batches = table.iter_batches(BATCH, use_threads=False)
        return table.schema_arrow.names, table.metadata.num_rows, batches
    with open(path, "rb") as stream:  # noqa: PTH123
        whole = stream.read(6) == b"ARROW1"
    reader = ipc.open_file(path) if whole else ipc.open_stream(path)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
    return (
        [],
        0,
        (batch.slice(start, BATCH) for batch in batches for start in range(0, len(batch), BATCH)),
    )


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
