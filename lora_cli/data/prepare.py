"""The rows a recipe trains on: read, recognised, rendered, encoded, selected, counted; the same for
both trainers.

Prepared before the run and kept on disk (`cache.py`); or, for sets that do not fit there
(`data.streaming`), the first of them looked at before the run, and all of them prepared while it
trains, over and over, drawn from a buffer. Memory is constant either way.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
)

from lora_cli.common import LoraError, find_nearest, ui
from lora_cli.data import cache, formats, readers, selection
from lora_cli.data.encode import Batch, Encoded, Renderer
from lora_cli.data.formats import BadRow
from lora_cli.data.selection import Counts, Kept
from lora_cli.data.sources import Source
from lora_cli.recipe import Data, Recipe

COLUMNS_FROM = 100
"""Rows, from the first, whose columns tell the format."""
FIRST = 20
"""Rows kept with their places, to be shown."""
LOOKED_AT = 10_000
"""Rows of a stream that are looked at before training."""


class Prepared(NamedTuple):
    """Rows with `input_ids` and `labels`, the first of them with their places, and what became of
    the rows read.

    Of a stream, all that is but the first of the rows; `stream` gives all, without end.
    """

    rows: Dataset
    first: list[Kept]
    counts: Counts
    fingerprint: str
    """A hash of every id and label; of a stream, of the first ones and of the files' first and last
    megabyte."""
    commit: str | None
    stream: IterableDataset | None = None

    def summary(self) -> str:
        """`571 of 1000 rows, 229563 tokens, 39% with loss (429 dropped: over 512 tokens)`."""
        counts = self.counts
        share = 100 * counts.trained_tokens / max(counts.tokens, 1)
        text = f"{len(self.rows)} of {counts.read} rows"
        text = f"{text}, {counts.tokens} tokens, {share:.0f}% with loss"
        text = f"{text} ({counts.reasons()})" if counts.reasons() else text
        return f"a stream, of its first rows {text}" if self.stream is not None else text


def prepare(source: Source, recipe: Recipe, renderer: Renderer) -> Prepared:
    """Everything the source has, ready to train on, from the cache where it was prepared before;
    says what to know.

    LoraError when a row cannot be used (unless `data.on_bad_row: skip`), or nothing is left to
    learn from.
    """
    key = cache.make_key(
        source.fingerprint(), source.names, recipe, renderer.tokenizer, renderer.day
    )
    entry = cache.find_folder() / key
    found = cache.read(entry)
    if found:
        ui.say(f"  {source.name}: prepared before, in {entry}")
    else:
        counts = Counts()
        rows = _select_rows(source, recipe, renderer, counts)
        gc.freeze()  # else each of many collections walks all that the libraries have made
        try:
            cache.write(
                entry, rows, counts, partial(_refuse_useless, source, recipe, counts), FIRST
            )
        finally:
            gc.unfreeze()
        found = cache.read(entry)
        assert found, "just written"
    selection.warn_of_counts(renderer.tokenizer, found.counts)
    return Prepared(
        found.rows, _first_rows(found.rows, found.places), found.counts, found.digest, source.commit
    )


def prepare_stream(source: Source, recipe: Recipe, renderer: Renderer) -> Prepared:
    """The first rows looked at, as `prepare` does, and all of them as a stream."""
    counts, notes = Counts(), cache.Notes(FIRST)
    look = recipe.data.model_copy(
        update={"max_rows": min(recipe.data.max_rows or LOOKED_AT, LOOKED_AT)}
    )
    beginning = recipe.model_copy(update={"data": look})
    batches = cache.make_batches(_select_rows(source, beginning, renderer, counts), notes)
    rows = Dataset(pyarrow.Table.from_batches(batches, cache.SCHEMA))
    _refuse_useless(source, recipe, counts)
    selection.warn_of_counts(renderer.tokenizer, counts)
    features = Features({name: List(Value("int32")) for name in cache.SCHEMA.names})
    endless = IterableDataset.from_generator(
        partial(_repeat_rows, source, recipe, renderer), features
    )
    if recipe.data.shuffle_buffer > 1:
        endless = endless.shuffle(seed=recipe.training.seed, buffer_size=recipe.data.shuffle_buffer)
    fingerprint = f"{notes.digest}, {source.fingerprint(ends_only=True)}"
    return Prepared(
        rows, _first_rows(rows, notes.places), counts, fingerprint, source.commit, endless
    )


def stream_rows(source: Source, recipe: Recipe, renderer: Renderer) -> Iterator[Kept]:
    """The rows as they come, none held; LoraError after the last for what `prepare` refuses."""
    counts = Counts()
    yield from _select_rows(source, recipe, renderer, counts)
    _refuse_useless(source, recipe, counts)


def _repeat_rows(source: Source, recipe: Recipe, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """The source's rows from the first to the last, again and again."""
    while True:
        for row in stream_rows(source, recipe, renderer):
            yield {"input_ids": row.input_ids, "labels": row.labels}


def _first_rows(rows: Dataset, places: list[str]) -> list[Kept]:
    shown = rows.select(range(len(places)))
    return [
        Kept(place, np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        for place, row in zip(places, shown)
    ]


def _refuse_useless(source: Source, recipe: Recipe, counts: Counts) -> None:
    """LoraError where there was no row, a bad one that is not to be skipped, or none to learn
    from."""
    if counts.read == 0:
        where = f"split {source.split} of " if source.split != "train" else ""
        raise LoraError(f"data.path: {where}{source.name} holds no row", f"head {source.name}")
    selection.refuse_bad_rows(recipe.data, counts)
    selection.refuse_nothing(counts)


def _select_rows(
    source: Source, recipe: Recipe, renderer: Renderer, counts: Counts
) -> Iterator[Kept]:
    """The rows to train on as they come, none held."""
    return selection.select_rows(_encode_rows(source, recipe, renderer, counts), recipe, counts)


def _encode_rows(
    source: Source, recipe: Recipe, renderer: Renderer, counts: Counts
) -> Iterator[tuple[str, list[Encoded]]]:
    """The usable rows with their places; bad ones are counted. Once one is an error, the rest is
    only looked at."""
    data = recipe.data
    rows: Iterator[tuple[str, readers.Row]] = islice(source.rows(), data.max_rows)
    first = list[tuple[str, readers.Row]]()
    readable = 0
    while readable < COLUMNS_FROM and len(first) < LOOKED_AT and (row := next(rows, None)):
        first.append(row)
        readable += not isinstance(row[1], BadRow)
    columns = list(
        dict.fromkeys(name for _, row in first if not isinstance(row, BadRow) for name in row)
    )
    style = _choose_format(data, columns) if columns else "text"
    convert = formats.find_converter(style, formats.uses_alpaca(renderer.tokenizer.chat_template))
    batches = _convert_rows(chain(first, rows), convert, data, counts)
    for batch, made in renderer.encode(batches):
        for (place, _), found in zip(batch, made):
            if isinstance(found, BadRow):
                counts.count_bad(place, found)
            else:
                yield place, found


def _convert_rows(
    rows: Iterator[tuple[str, readers.Row]], convert: formats.Converter, data: Data, counts: Counts
) -> Iterator[Batch]:
    """The usable rows, in batches; none any more once a bad one is an error."""
    while read := list(islice(rows, readers.BATCH)):
        counts.read += len(read)
        batch: Batch = []
        for place, row in read:
            try:
                if isinstance(row, BadRow):
                    raise row
                batch.append(
                    (place, convert(_rename_columns(row, data.columns) if data.columns else row))
                )
            except BadRow as bad:
                counts.count_bad(place, bad)
        if batch and not (counts.first_bad and data.on_bad_row == "error"):
            yield batch


def _rename_columns(row: dict[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    """The row under our column names (`columns` is ours: theirs); a column of theirs in the way is
    left out."""
    theirs = set(columns.values())
    kept = {
        name: value for name, value in row.items() if name not in theirs and name not in columns
    }
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def _choose_format(data: Data, columns: list[str]) -> str:
    """The format of the rows, told by their columns unless the recipe says."""
    for theirs in data.columns.values():
        if theirs not in columns:
            raise _missing_column(theirs, columns, "data.columns")
    named = list(_rename_columns(dict.fromkeys(columns), data.columns))
    if data.format != "auto":
        for column in formats.FORMATS[data.format]:
            if column not in named:
                raise _missing_column(column, named, f"data.format: {data.format}")
        return data.format
    if style := formats.recognise_format(named):
        return style
    answer = next(
        (name for name in columns if name in ("chosen", "answer", "response")), columns[-1]
    )
    shapes = "; ".join(f"{style}: {', '.join(needed)}" for style, needed in formats.FORMATS.items())
    raise LoraError(
        f"data.path: the columns {', '.join(columns)} are of no known format ({shapes})",
        f"--set data.columns='{{prompt: {columns[0]}, completion: {answer}}}'",
    )


def _missing_column(column: str, columns: list[str], where: str) -> LoraError:
    guess = find_nearest(column, columns)
    hint = f"did you mean {guess}?" if guess else "data.columns: {ours: theirs} names them"
    return LoraError(f"{where}: there is no column {column}; there are {', '.join(columns)}", hint)
