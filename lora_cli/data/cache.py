"""Keep prepared rows on disk: they are rendered and tokenised once, and training reads them without
holding them.

An entry is a folder named by a hash of all that its rows depend on: the content of the files, the
tokenizer and its chat template, every option, the libraries' versions and this program's own code.
It holds `rows.arrow`, which is mapped into memory, and `counts.json`. Writing a new entry removes
those that were not used for 30 days.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset
from pydantic import Field

from lora_cli.common import LoraError, files, plain_files, stored, ui
from lora_cli.data.digests import DIGEST
from lora_cli.data.encoders import Encoder
from lora_cli.data.offsets import NDArray, count_ids
from lora_cli.data.preferences import DOCUMENTS, are_pairs
from lora_cli.data.selection import Counts, Kept
from lora_cli.models import PictureProcessor, Reader
from lora_cli.recipe import Data, Recipe

PACKAGE = Path(__file__).parent.parent
CODE = (
    *sorted(PACKAGE.glob("data/*.py")),
    PACKAGE / "models/chat_template.py",
    PACKAGE / "models/template_program.py",
    PACKAGE / "models/tokenizer.py",
)
"""The files of this program that decide which rows come out, and what is in them."""
PACKAGES = ("transformers", "tokenizers", "jinja2")
SOURCES = {
    *("path", "mix", "name", "revision", "split", "eval_path", "eval_split"),
    *("streaming", "shuffle_buffer", "eval_fraction", "eval_rows"),
}
"""Keys of `data` that say where rows come from: their content counts, whatever its name is."""
OPTIONS = tuple(name for name in Data.model_fields if name not in SOURCES)
OF_MODEL = ("labels", "problem_type")
ROWS = "rows.arrow"
COUNTS = "counts.json"
BATCH = 1000
LARGEST = 2**26
"""Bytes of pictures that are written at a time."""


class Notes:
    """What is remembered of rows as they pass: the places of the first ones, and a hash of every id
    and label."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.places = list[str]()
        self.hash = hashlib.sha256()

    def hash_columns(self, columns: Sequence[tuple[NDArray, NDArray]]) -> None:
        """Take in a batch's columns, each as where its lists end and all their numbers; ends that
        are those of the first column say nothing more."""
        first = columns[0][0]
        for number, (ends, values) in enumerate(columns):
            if not number or not np.array_equal(ends, first):
                self.hash.update(ends.tobytes())
            self.hash.update(values.tobytes())

    @property
    def digest(self) -> str:
        """The hash as 32 hex digits."""
        return self.hash.hexdigest()[:32]


class KeptCounts(stored.Stored):
    """What lies beside kept rows: the places of the first of them, their hash and counts."""

    places: list[str]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]
    counts: Counts


class Entry(NamedTuple):
    """Prepared rows, their counts, the places of the first of them, and a hash of them all."""

    rows: Dataset
    counts: Counts
    places: list[str]
    digest: str


def find_folder() -> Path:
    """Return the folder of all entries."""
    return files.find_cache_home() / "rows"


def make_key(source: str, names: list[str], recipe: Recipe, reader: Reader, day: date) -> str:
    """Return a hash (32 hex digits) of all that decides the rows.

    `source` is a hash of their content, `names` are the files' paths. `day` counts only for
    templates that write the date.
    """
    code = hashlib.sha256()
    for path in CODE:
        code.update(path.read_bytes())
    template = reader.chat_template
    decides = {
        "code": code.hexdigest(),
        "versions": {name: version(name) for name in PACKAGES},
        "source": source,
        "names": names,
        **_describe_reader(reader),
        "template": template,
        "day": str(day) if "strftime_now" in str(template) else None,
        "options": {name: getattr(recipe.data, name) for name in OPTIONS},
        "task": recipe.task,
        "pairs": recipe.objective_row.compares,
        "unpaired": recipe.objective_row.unpaired,
        "of_model": {name: getattr(recipe.model, name) for name in OF_MODEL},
        "max_length": recipe.training.max_length,
        "digests": recipe.data.holds_out,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _describe_reader(reader: Reader) -> dict[str, Any]:
    """Return what a tokenizer makes of texts; pictures are kept as they are, whatever reads
    them."""
    if isinstance(reader, PictureProcessor):
        return {"pictures": version("pillow")}
    return {
        "tokenizer": hashlib.sha256(reader.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in reader.special_tokens_map.items()},
    }


def make_schema(encoder: Encoder, data: Data) -> pyarrow.Schema:
    """Return the columns of an encoder's rows, with what tells those apart that are held out."""
    columns = {**encoder.columns, **({DIGEST: np.int64} if data.holds_out else {})}
    return pyarrow.schema(
        {name: pyarrow.list_(pyarrow.from_numpy_dtype(kind)) for name, kind in columns.items()}
    )


def read(entry: Path, encoder: Encoder, data: Data) -> Entry | None:
    """Return what is kept in the folder `entry`, or None where it is missing, damaged, or no rows
    of an encoder."""
    if not entry.exists():
        return None
    try:
        plain_files.refuse_odd_files(entry)
        if hasattr(os, "getuid") and entry.stat().st_uid != os.getuid():
            raise ValueError("they are another user's")
        kept = KeptCounts.read(entry / COUNTS)
        rows = Dataset.from_file(str(entry / ROWS))
        rows.data.table.validate(full=True)  # or offsets outside the buffers end the process
        if len(rows) != kept.counts.kept or not len(kept.places) <= len(rows):
            raise ValueError(f"{len(rows)} rows, not {kept.counts.kept}")
        if rows.data.table.schema.remove_metadata() != make_schema(encoder, data):
            raise ValueError("they have other columns")
        if _hash_rows(rows) != kept.digest:
            raise ValueError("they differ from what was written")
        _refuse_foreign_ids(rows, encoder)
        with suppress(OSError):  # of a cache that may only be read, nothing is removed either
            os.utime(entry / COUNTS)
    # ArrowInvalid is a ValueError; columns may be missing, or of another type
    except (LoraError, OSError, ValueError, KeyError, AttributeError) as error:
        ui.warn(f"the rows kept in {entry} are damaged ({error}): they are prepared anew")
        files.remove(entry)
        return None
    return Entry(give_format(rows, encoder), kept.counts, kept.places, kept.digest)


def give_format(rows: Dataset, encoder: Encoder) -> Dataset:
    """Return rows as they are trained on: with lists of numbers, or, of pictures, with arrays,
    which do not hold an object for each byte."""
    return rows.with_format("numpy") if "image" in encoder.columns else rows


def _refuse_foreign_ids(rows: Dataset, encoder: Encoder) -> None:
    """Raise ValueError where an id is no word's, or a label none that the encoder gives."""
    first, reader = next(iter(encoder.columns)), encoder.tokenizer
    words = 0 if isinstance(reader, PictureProcessor) else count_ids(reader)
    for batch in rows.data.table.to_batches():
        ids, labels = (batch.column(name) for name in (first, "labels"))
        tokens, trained = ids.values.to_numpy(), labels.values.to_numpy()
        alike = not encoder.by_token or ids.offsets.equals(labels.offsets)
        lengths = np.diff(ids.offsets.to_numpy())
        if not (alike and lengths.all()):
            raise ValueError("a row has no tokens, or others than labels")
        known = first != "input_ids" or ((tokens >= 0) & (tokens < words)).all()
        if not (known and encoder.are_labels(tokens, trained, lengths)):
            raise ValueError("an id is no word of the tokenizer's")
        if DOCUMENTS in encoder.columns:
            cut = batch.column(DOCUMENTS)
            if not are_pairs(lengths, cut.flatten().to_numpy()):
                raise ValueError("a row is not cut in two")


def _hash_rows(rows: Dataset) -> str:
    """Return the digest of rows as they were written, batch by batch."""
    notes = Notes(0)
    for batch in rows.data.table.to_batches():
        columns = batch.columns
        notes.hash_columns([(each.offsets.to_numpy(), each.values.to_numpy()) for each in columns])
    return notes.digest


def write(
    entry: Path,
    rows: Iterator[Kept],
    schema: pyarrow.Schema,
    counts: Counts,
    check: Callable[[], None],
    first: int,
) -> None:
    """Make an entry of `rows`, completely or not at all, with the places of the `first` ones.

    When the last row has passed, so that `counts` are complete, `check()` may refuse the entry by
    raising.
    """
    try:
        files.make_cache_folder(entry.parent)
    except OSError as error:
        raise LoraError(
            f"prepared rows cannot be kept in {entry.parent}: {error.strerror}",
            "set LORA_CACHE_DIR to another folder",
        ) from error
    notes = Notes(first)
    with files.scratch_folder(entry.parent) as staging:
        fresh = staging / entry.name
        fresh.mkdir(mode=0o700)
        with (fresh / ROWS).open("wb") as file:
            with pyarrow.ipc.new_stream(file, schema) as writer:
                for batch in make_batches(rows, schema, notes):
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        check()
        kept = KeptCounts(places=notes.places, digest=notes.digest, counts=counts)
        files.write_json(fresh / COUNTS, kept.to_data())
        files.remove_unused(entry.parent, COUNTS)
        try:
            fresh.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was first, with the same rows
                raise


def _gather(rows: Iterable[Kept]) -> Iterator[list[Kept]]:
    """Yield rows so many at a time, or fewer that are together as large as LARGEST."""
    batch, held = list[Kept](), 0
    for row in rows:
        batch.append(row)
        held += row.others["image"].nbytes if "image" in row.others else 0
        if len(batch) == BATCH or held >= LARGEST:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def make_batches(
    rows: Iterable[Kept], schema: pyarrow.Schema, notes: Notes
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows in columns, of the numbers that the schema says, and take `notes` of them."""
    for batch in _gather(rows):
        notes.places += [row.place for row in batch[: notes.first - len(notes.places)]]
        columns = []
        for name in schema.names:
            lists = [row.read(name) for row in batch]
            ends = np.cumsum([0, *map(len, lists)], dtype=np.int32)
            columns.append((ends, np.concatenate(lists)))
        notes.hash_columns(columns)
        made = [pyarrow.ListArray.from_arrays(*column) for column in columns]
        yield pyarrow.record_batch(made, schema=schema)
