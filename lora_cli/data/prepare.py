"""The rows a recipe trains on: read, recognised, rendered, encoded, selected, counted; the same for both trainers.

Prepared before the run and kept on disk (`cache.py`); or, for sets that do not fit there (`data.streaming`), the first
of them looked at before the run, and all of them prepared while it trains, over and over, drawn from a buffer. Memory
is constant either way.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import chain, islice, pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from transformers import PreTrainedTokenizerBase

from lora_cli.common import ui
from lora_cli.common.errors import LoraError, nearest
from lora_cli.data import cache, formats, readers, selection, sources
from lora_cli.data.encode import IGNORED, Batch, Encoded, Renderer
from lora_cli.data.formats import BadRow
from lora_cli.data.selection import Counts, Kept
from lora_cli.data.sources import Source
from lora_cli.recipe.keys import Data, Recipe, Rows

COLUMNS_FROM = 100
"""Rows, from the first, whose columns tell the format."""
FIRST = 20
"""Rows kept with their places, to be shown."""
LOOKED_AT = 10_000
"""Rows of a stream that are looked at before training."""


class Prepared(NamedTuple):
    """Rows with `input_ids` and `labels`, the first of them with their places, and what became of the rows read.

    Of a stream, all that is but the first of the rows; `stream` gives all, without end.
    """

    rows: Dataset
    first: list[Kept]
    counts: Counts
    fingerprint: str
    """A hash of every id and label; of a stream, of the first ones and of the files' first and last megabyte."""
    commit: str | None
    stream: IterableDataset | None = None

    def summary(self) -> str:
        """`571 of 1000 rows, 229563 tokens, 39% with loss (429 dropped: over 512 tokens)`."""
        counts = self.counts
        share = 100 * counts.trained_tokens / max(counts.tokens, 1)
        text = f"{len(self.rows)} of {counts.read} rows, {counts.tokens} tokens, {share:.0f}% with loss"
        text = f"{text} ({counts.reasons()})" if counts.reasons() else text
        return f"a stream, of its first rows {text}" if self.stream is not None else text


def load(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, day: date | None = None
) -> tuple[Prepared, Prepared | None]:
    """The rows to train on and, where the recipe gives any, those to evaluate on.

    `day` is what chat templates that write the date are to write: a resumed run trains on the rows it began with.
    """
    data, renderer = recipe.data, Renderer(tokenizer, recipe.data.train_on, day)
    if "strftime_now" in str(tokenizer.chat_template):
        ui.say(f"  the chat template writes the date into every conversation: {renderer.day}")
    train = _mixed(recipe, renderer, data.mix) if data.mix else _one(recipe, renderer, "path", data.path, data.split)
    if renderer.adds_bos and all(row.input_ids[0] != tokenizer.bos_token_id for row in train.first):
        ui.warn(f"rows do not begin with {tokenizer.bos_token}: the chat template writes none, the tokenizer would")
    if not (data.eval_path or data.eval_split):
        return train, None
    where = "eval_path" if data.eval_path else "path"
    whole = recipe.model_copy(update={"data": data.model_copy(update={"streaming": False})})
    evaluation = _one(whole, renderer, where, data.eval_path or data.path, data.eval_split or "train")
    if both := _shared(train.rows, evaluation.rows):
        ui.warn(f"{both} of {len(evaluation.rows)} evaluation rows are trained on as well")
    return train, evaluation


def _shared(train: Dataset, evaluation: Dataset) -> int:
    """How many rows of `evaluation` are in `train` too, looking at the first million."""
    trained = {bytes(ids) for ids in _ids(train, 1_000_000)}
    return sum(bytes(ids) in trained for ids in _ids(evaluation, 1_000_000))


def _ids(rows: Dataset, limit: int) -> Iterator[memoryview]:
    for batch in rows.select(range(min(limit, len(rows)))).with_format("arrow").iter(cache.BATCH):
        for chunk in batch["input_ids"].chunks:
            ends, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
            yield from (memoryview(values[start:end]).cast("B") for start, end in pairwise(ends))


def _one(recipe: Recipe, renderer: Renderer, where: str, path: str | list[str] | None, split: str) -> Prepared:
    assert path is not None
    source = sources.find(recipe.data, where, path, split)
    return _streamed(source, recipe, renderer) if recipe.data.streaming else prepare(source, recipe, renderer)


def _mixed(recipe: Recipe, renderer: Renderer, mix: Sequence[Rows]) -> Prepared:
    """The data sets one after the other (training draws its rows in random order), each as often as it weighs; streams
    are drawn from at random, the more often the more they weigh."""
    parts: list[Prepared] = []
    for number, rows in enumerate(mix):
        own = recipe.data.model_copy(update={**dict(rows), "mix": None})
        part = _one(recipe.model_copy(update={"data": own}), renderer, f"mix.{number}.path", rows.path, rows.split)
        ui.say(f"  {rows.path} x {rows.weight:g}: {part.summary()}")
        parts.append(part)
    seed, weights = recipe.training.seed, [rows.weight for rows in mix]
    counts, streams = parts[0].counts, [part.stream for part in parts if part.stream is not None]
    for part in parts[1:]:
        counts = counts.plus(part.counts)
    if not streams:
        parts = [_weighted(part, weight, [seed, number]) for number, (part, weight) in enumerate(zip(parts, weights))]
        counts.tokens = sum(part.counts.tokens for part in parts)
        counts.trained_tokens = sum(part.counts.trained_tokens for part in parts)
    drawn = interleave_datasets(streams, [weight / sum(weights) for weight in weights], seed) if streams else None
    fingerprint = hashlib.sha256("".join(f"{part.fingerprint} {w}" for part, w in zip(parts, weights)).encode())
    first = [row for rows in zip_longest(*(part.first for part in parts)) for row in rows if row is not None]
    commits = ", ".join(part.commit for part in parts if part.commit) or None
    rows = concatenate_datasets([part.rows for part in parts])
    if not len(rows):
        raise LoraError("the weights of data.mix leave no row", "give one of them a larger weight")
    return Prepared(rows, first[:FIRST], counts, fingerprint.hexdigest()[:32], commits, drawn)


def _weighted(part: Prepared, weight: float, seed: list[int]) -> Prepared:
    """The rows so many times, and of the share that is left over as many, drawn at random; tokens counted anew."""
    whole, share = divmod(weight, 1)
    drawn = np.random.default_rng(seed).permutation(len(part.rows))[: round(share * len(part.rows))]
    some = part.rows.select(np.sort(drawn))
    tokens, learned = int(whole) * part.counts.tokens, int(whole) * part.counts.trained_tokens
    for batch in some.with_format("numpy").iter(cache.BATCH):
        labels = np.concatenate(list(batch["labels"]))
        tokens, learned = tokens + len(labels), learned + int((labels != IGNORED).sum())
    return part._replace(
        rows=concatenate_datasets([part.rows] * int(whole) + [some]),
        counts=Counts(tokens=tokens, trained_tokens=learned),
    )


def prepare(source: Source, recipe: Recipe, renderer: Renderer) -> Prepared:
    """Everything the source has, ready to train on, from the cache where it was prepared before; says what to know.

    LoraError when a row cannot be used (unless `data.on_bad_row: skip`), or nothing is left to learn from.
    """
    key = cache.key(source.fingerprint(), source.names, recipe, renderer.tokenizer, renderer.day)
    entry = cache.folder() / key
    found = cache.read(entry)
    if found:
        ui.say(f"  {source.name}: prepared before, in {entry}")
    else:
        counts = Counts()
        rows = _kept(source, recipe, renderer, counts)
        gc.freeze()  # else each of many collections walks all that the libraries have made
        try:
            cache.write(entry, rows, counts, partial(_refuse, source, recipe, counts), FIRST)
        finally:
            gc.unfreeze()
        found = cache.read(entry)
        assert found, "just written"
    selection.warn(renderer.tokenizer, found.counts)
    return Prepared(found.rows, _first(found.rows, found.places), found.counts, found.digest, source.commit)


def _streamed(source: Source, recipe: Recipe, renderer: Renderer) -> Prepared:
    """The first rows looked at, as `prepare` does, and all of them as a stream."""
    counts, notes = Counts(), cache.Notes(FIRST)
    look = recipe.data.model_copy(update={"max_rows": min(recipe.data.max_rows or LOOKED_AT, LOOKED_AT)})
    beginning = recipe.model_copy(update={"data": look})
    batches = cache.batches(_kept(source, beginning, renderer, counts), notes)
    rows = Dataset(pyarrow.Table.from_batches(batches, cache.SCHEMA))
    _refuse(source, recipe, counts)
    selection.warn(renderer.tokenizer, counts)
    features = Features({name: List(Value("int32")) for name in cache.SCHEMA.names})
    endless = IterableDataset.from_generator(partial(_endless, source, recipe, renderer), features)
    if recipe.data.shuffle_buffer > 1:
        endless = endless.shuffle(seed=recipe.training.seed, buffer_size=recipe.data.shuffle_buffer)
    fingerprint = f"{notes.digest}, {source.fingerprint(ends_only=True)}"
    return Prepared(rows, _first(rows, notes.places), counts, fingerprint, source.commit, endless)


def stream(source: Source, recipe: Recipe, renderer: Renderer) -> Iterator[Kept]:
    """The rows as they come, none held; LoraError after the last for what `prepare` refuses."""
    counts = Counts()
    yield from _kept(source, recipe, renderer, counts)
    _refuse(source, recipe, counts)


def _endless(source: Source, recipe: Recipe, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """The source's rows from the first to the last, again and again."""
    while True:
        for row in stream(source, recipe, renderer):
            yield {"input_ids": row.input_ids, "labels": row.labels}


def _first(rows: Dataset, places: list[str]) -> list[Kept]:
    shown = rows.select(range(len(places)))
    return [
        Kept(place, np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        for place, row in zip(places, shown)
    ]


def _refuse(source: Source, recipe: Recipe, counts: Counts) -> None:
    """LoraError where there was no row, a bad one that is not to be skipped, or none to learn from."""
    if counts.read == 0:
        where = f"split {source.split} of " if source.split != "train" else ""
        raise LoraError(f"data.path: {where}{source.name} holds no row", f"head {source.name}")
    selection.refuse_bad_rows(recipe.data, counts)
    selection.refuse_nothing(counts)


def _kept(source: Source, recipe: Recipe, renderer: Renderer, counts: Counts) -> Iterator[Kept]:
    """The rows to train on as they come, none held."""
    return selection.select(_encoded(source, recipe, renderer, counts), recipe, counts)


def _encoded(source: Source, recipe: Recipe, renderer: Renderer, counts: Counts) -> Iterator[tuple[str, list[Encoded]]]:
    """The usable rows with their places; bad ones are counted. Once one is an error, the rest is only looked at."""
    data = recipe.data
    rows: Iterator[tuple[str, readers.Row]] = islice(source.rows(), data.max_rows)
    first = list[tuple[str, readers.Row]]()
    readable = 0
    while readable < COLUMNS_FROM and len(first) < LOOKED_AT and (row := next(rows, None)):
        first.append(row)
        readable += not isinstance(row[1], BadRow)
    columns = list(dict.fromkeys(name for _, row in first if not isinstance(row, BadRow) for name in row))
    style = _format(data, columns) if columns else "text"
    convert = formats.converter(style, formats.uses_alpaca(renderer.tokenizer.chat_template))
    batches = _converted(chain(first, rows), convert, data, counts)
    for batch, made in renderer.encode(batches):
        for (place, _), found in zip(batch, made):
            if isinstance(found, BadRow):
                counts.count_bad(place, found)
            else:
                yield place, found


def _converted(
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
                batch.append((place, convert(_renamed(row, data.columns) if data.columns else row)))
            except BadRow as bad:
                counts.count_bad(place, bad)
        if batch and not (counts.first_bad and data.on_bad_row == "error"):
            yield batch


def _renamed(row: dict[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    """The row under our column names (`columns` is ours: theirs); a column of theirs in the way is left out."""
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs and name not in columns}
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def _format(data: Data, columns: list[str]) -> str:
    """The format of the rows, told by their columns unless the recipe says."""
    for theirs in data.columns.values():
        if theirs not in columns:
            raise _missing_column(theirs, columns, "data.columns")
    named = list(_renamed(dict.fromkeys(columns), data.columns))
    if data.format != "auto":
        for column in formats.FORMATS[data.format]:
            if column not in named:
                raise _missing_column(column, named, f"data.format: {data.format}")
        return data.format
    if style := formats.recognise(named):
        return style
    answer = next((name for name in columns if name in ("chosen", "answer", "response")), columns[-1])
    shapes = "; ".join(f"{style}: {', '.join(needed)}" for style, needed in formats.FORMATS.items())
    raise LoraError(
        f"data.path: the columns {', '.join(columns)} are of no known format ({shapes})",
        f"--set data.columns='{{prompt: {columns[0]}, completion: {answer}}}'",
    )


def _missing_column(column: str, columns: list[str], where: str) -> LoraError:
    guess = nearest(column, columns)
    hint = f"did you mean {guess}?" if guess else "data.columns: {ours: theirs} names them"
    return LoraError(f"{where}: there is no column {column}; there are {', '.join(columns)}", hint)
