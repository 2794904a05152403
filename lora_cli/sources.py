"""Where rows come from: local files, a folder, or a data set on the hub; each row with the place it stands at.

Local files are read here, not by `datasets`: its readers stop at the first row whose types differ from the rows before,
and do not say in which file and line. Everything is read in batches; nothing is held.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from huggingface_hub import resolve_revision

from lora_cli import foreign
from lora_cli.errors import LoraError, nearest
from lora_cli.formats import BadRow
from lora_cli.recipe import Data

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
BATCH = 1000

Row = dict[str, Any] | BadRow
"""A row as it was read, or why it could not be."""


class Source(NamedTuple):
    """Rows to be read: of files, or of a data set of the `datasets` library."""

    files: list[Path]
    table: Dataset | IterableDataset | None
    split: str
    commit: str | None = None

    @property
    def name(self) -> str:
        """What is read, for messages."""
        return str(self.files[0]) if self.files else "the data set"

    @property
    def names(self) -> list[str]:
        """The places of the files, as rows name them."""
        return [str(file) for file in self.files]

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Every row with its place: `rows.jsonl:17`, or `row 17` of a table; both count from 1."""
        if self.table is not None:
            number = 0
            for batch in self.table.iter(batch_size=BATCH):
                names = list(batch)
                for values in zip(*batch.values()):
                    number += 1
                    yield f"row {number}", dict(zip(names, values))
            return
        if self.split == "train":
            yield from self._all()
            return
        total = sum(1 for _ in self._all())
        for part in ReadInstruction.from_spec(self.split).to_absolute({"train": total}):
            yield from islice(self._all(), part.from_ or 0, part.to)

    def _all(self) -> Iterator[tuple[str, Row]]:
        return (row for file in self.files for row in _read(file))

    def fingerprint(self, ends_only: bool = False) -> str:
        """A hash of the content of what is read, not of times; `ends_only`: of its size, first and last megabyte."""
        total = hashlib.sha256(self.split.encode())
        for file in self.files:
            with file.open("rb") as stream:
                if ends_only:
                    size = file.stat().st_size
                    total.update(b"%d" % size + stream.read(1 << 20))
                    stream.seek(max(0, size - (1 << 20)))
                while block := stream.read(1 << 20):
                    total.update(block)
        if isinstance(self.table, Dataset):
            with pyarrow.ipc.new_stream(pyarrow.PythonFile(_Hashing(total), "w"), self.table.data.schema) as writer:
                for batch in self.table.with_format("arrow").iter(BATCH):
                    writer.write_table(batch)
        elif self.table is not None:
            total.update(f"{self.commit} {self.table.info.config_name}".encode())
        return total.hexdigest()[:32]


class _Hashing(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, total: Any) -> None:
        self.total = total

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.total.update(block)
        return len(block)


def find(data: Data, field: str, path: str | list[str], split: str) -> Source:
    """What data.`field` names. LoraError when it is not there, empty, or of no kind that can be read."""
    paths = [path] if isinstance(path, str) else path
    try:
        files = [file for name in paths for file in _local(field, name)]
        if files:
            return _files(field, files, split)
        if len(paths) > 1:
            raise LoraError(
                f"data.{field}: {paths[0]} does not exist; a list must name local files", f"ls {Path(paths[0]).parent}"
            )
        if Path(paths[0]).is_dir():
            return _folder(data, Path(paths[0]), split)
        return _hub(data, paths[0], split)
    except (ValueError, IndexError) as error:
        if foreign.translate(error) is not None:
            raise
        said = " ".join(str(error).split())
        raise LoraError(f"data.{field}: {path}, split {split!r}: {said}", "check the path and the split") from error


def _local(field: str, name: str) -> list[Path]:
    """The files that a path or a pattern such as `data/*.jsonl` names; none for a folder or a name on the hub."""
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))  # noqa: PTH207 – absolute patterns too
        if not found:
            raise LoraError(f"data.{field}: no file matches {name}", f"ls {Path(name).parent}")
        return [file for file in found if file.is_file()]
    path = Path(name)
    if path.is_file() or (_kind(path) is not None and not path.is_dir()):
        return [path]
    return []


def _kind(file: Path) -> str | None:
    """How a file is read, told by its name, also under .gz."""
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return KINDS.get(name.suffix.lower())


def _files(field: str, files: list[Path], split: str) -> Source:
    for file in files:
        if not file.is_file():
            raise LoraError(f"data.{field}: {file} does not exist", f"ls {file.parent}")
        if _kind(file) is None:
            raise LoraError(
                f"data.{field}: {file} is none of {', '.join(KINDS)}, nor one of them with .gz",
                f"mv {file} {file}.jsonl",
            )
        if file.stat().st_size == 0:
            raise LoraError(f"data.{field}: {file} is empty", f"ls -l {file}")
    if not re.fullmatch(r"train(\[.*\])?(\+train(\[.*\])?)*", split):
        raise LoraError(
            f"data.{field}: local files have the split train only, not {split!r}", "split: train, or train[:1000]"
        )
    return Source(files, None, split)


def _folder(data: Data, folder: Path, split: str) -> Source:
    """A folder that `datasets` saved, or one of files."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise LoraError(
                f"{folder} has no split {split!r}; it has {', '.join(saved)}",
                f"split: {nearest(split, saved) or next(iter(saved))}",
            )
        return Source([], saved[split] if isinstance(saved, DatasetDict) else saved, split)
    return Source([], load_dataset(str(folder), data.name, split=split, streaming=data.streaming), split)


def _hub(data: Data, name: str, split: str) -> Source:
    """A hub data set at one commit. Offline, `load_dataset` would take whatever it built last: LoraError then."""
    commit = str(resolve_revision(name, repo_type="dataset", revision=data.revision).resolved)
    table = load_dataset(name, data.name, split=split, revision=commit, streaming=data.streaming)
    if isinstance(table, Dataset) and not all(commit in Path(file["filename"]).parts for file in table.cache_files):
        raise LoraError(f"data.path: {name} is cached at another revision than {commit}", "unset HF_HUB_OFFLINE")
    return Source([], table, split, commit)


# Readers of one file ------------------------------------------------------------------------------------------------


def _read(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of one file, each with its place."""
    kind = _kind(file)
    if kind in ("parquet", "arrow"):
        yield from _read_arrow(file, str(kind))
        return
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
            if kind == "csv":
                yield from _read_csv(file, stream)
            elif kind == "text":
                yield from (
                    (f"{file}:{number}", {"text": line.rstrip("\r\n")})
                    for number, line in enumerate(stream, 1)
                    if line.strip()
                )
            else:
                yield from _read_json(file, stream)
    except UnicodeDecodeError:
        with opened(file, "rb") as raw:
            raise _not_utf8(file, raw) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise LoraError(f"{file} is no whole gzip file: {error}", f"gzip -t {file}") from None


def _not_utf8(file: Path, raw: Iterable[bytes]) -> LoraError:
    """Where the first byte stands that is no UTF-8."""
    for number, line in enumerate(raw, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            said = f"{file}:{number}: byte {error.start + 1} is not UTF-8 ({line[error.start]:#04x})"
            return LoraError(said, f"iconv -f LATIN1 -t UTF-8 {file}")
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
            yield f"{file}:{number}", _parse(line, number == 1)


def _parse(line: str, first: bool) -> Row:
    try:
        value = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        if first and line.strip() == "{":
            return BadRow("one JSON object over many lines", hint="one row a line, or one list of rows: jq -c . FILE")
        return BadRow("invalid JSON", f"column {error.colno}: invalid JSON: {error.msg}")
    if not isinstance(value, dict):
        return BadRow("a row is no mapping", f"the row is {line.strip()[:40]}, not a mapping of columns")
    return value


def _read_json_list(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(f"{file}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}", f"jq . {file}") from None
    for number, value in enumerate(values, 1):
        place = f"{file}, row {number}"
        yield (
            place,
            value
            if isinstance(value, dict)
            else BadRow("a row is no mapping", f"it is {json.dumps(value)[:40]}, not a mapping of columns"),
        )


def _read_csv(file: Path, stream: TextIO) -> Iterator[tuple[str, Row]]:
    """Rows under a header line; separated by whichever of comma, tabulator and semicolon stands in it most often."""
    csv.field_size_limit(1 << 30)
    first = stream.readline()
    rows = csv.reader(chain([first], stream), delimiter=max(",\t;", key=first.count), strict=True)
    try:
        header = next(rows)
        for values in rows:
            if not values:
                continue
            if len(values) != len(header):
                yield (
                    f"{file}:{rows.line_num}",
                    BadRow("another number of columns", f"{len(values)} columns, but the header has {len(header)}"),
                )
            else:
                yield f"{file}:{rows.line_num}", dict(zip(header, values))
    except csv.Error as error:
        raise LoraError(f"{file}:{rows.line_num}: invalid CSV: {error}", f"sed -n {rows.line_num}p {file}") from None


def _read_arrow(file: Path, kind: str) -> Iterator[tuple[str, Row]]:
    from pyarrow import ipc, parquet

    try:
        if kind == "parquet":
            batches = parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
        else:
            with file.open("rb") as stream:
                whole = stream.read(6) == b"ARROW1"
            reader = ipc.open_file(file) if whole else ipc.open_stream(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if whole else iter(reader)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise LoraError(f"{file} is no {kind} file: {' '.join(str(error).split())[:200]}", f"ls -l {file}") from None
