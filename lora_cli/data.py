"""The rows a recipe trains on: read, recognised, rendered, encoded, selected, counted; the same for both trainers."""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_cli import formats, sources, ui
from lora_cli.errors import LoraError, nearest
from lora_cli.formats import BadRow
from lora_cli.recipe import Data, Recipe, Rows
from lora_cli.render import IGNORED, Batch, Encoded, NDArray, Renderer

COLUMNS_FROM = 100
"""Rows, from the first, whose columns tell the format."""


FIRST = 20
"""Rows kept with their places, to be shown."""


class Kept(NamedTuple):
    """A row to train on, and where it was read."""

    place: str
    input_ids: NDArray
    labels: NDArray


@dataclass
class Counts:
    """What became of the rows read, counted while they pass."""

    read: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows dropped, cut or split, by reason."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be used, by kind."""
    first_bad: tuple[str, BadRow] | None = None
    by_turn: int = 0
    """Conversations that became one row for each answer."""
    control_in_text: int = 0
    """Rows in whose text control tokens stand."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Lengths of all encoded rows, in tokens."""
    ends: Counter[int] = field(default_factory=Counter)
    """The last token with loss of each row that was not cut."""

    def plus(self, other: Counts) -> Counts:
        """Both together; of the first bad rows the earlier."""
        sums = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, value in sums.items():
            if name != "first_bad":
                sums[name] = value + getattr(other, name)
        return Counts(**sums | {"first_bad": self.first_bad or other.first_bad})


class Prepared(NamedTuple):
    """Rows with `input_ids` and `labels`, the first of them with their places, and what became of the rows read."""

    rows: Dataset
    first: list[Kept]
    counts: Counts
    fingerprint: str
    commit: str | None

    def summary(self) -> str:
        """`571 of 1000 rows, 229563 tokens, 39% with loss (429 dropped: over 512 tokens)`."""
        counts = self.counts
        share = 100 * counts.trained_tokens / max(counts.tokens, 1)
        text = f"{len(self.rows)} of {counts.read} rows, {counts.tokens} tokens, {share:.0f}% with loss"
        left_out = ", ".join(f"{number} {reason}" for reason, number in counts.left_out.items() if number)
        return f"{text} ({left_out})" if left_out else text


def load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Prepared, Prepared | None]:
    """The rows to train on and, where the recipe gives any, those to evaluate on."""
    data = recipe.data
    train = _mixed(recipe, tokenizer, data.mix) if data.mix else _one(recipe, tokenizer, "path", data.path, data.split)
    if not (data.eval_path or data.eval_split):
        return train, None
    where = "eval_path" if data.eval_path else "path"
    return train, _one(recipe, tokenizer, where, data.eval_path or data.path, data.eval_split or "train")


def _one(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, where: str, path: str | list[str] | None, split: str
) -> Prepared:
    assert path is not None
    return prepare(sources.find(recipe.data, where, path, split), recipe, tokenizer)


def _mixed(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Sequence[Rows]) -> Prepared:
    """The data sets one after the other (training draws its rows in random order), each as often as it weighs."""
    parts, tables = [], []
    for number, rows in enumerate(mix):
        own = recipe.data.model_copy(update={**dict(rows), "mix": None})
        prepared = _one(recipe.model_copy(update={"data": own}), tokenizer, f"mix.{number}.path", rows.path, rows.split)
        ui.say(f"  {rows.path} x {rows.weight:g}: {prepared.summary()}")
        whole, share = divmod(rows.weight, 1)
        draw = np.random.default_rng([recipe.training.seed, number])
        some = np.sort(draw.permutation(len(prepared.rows))[: round(share * len(prepared.rows))])
        tables += [prepared.rows.data.table] * int(whole) + [prepared.rows.data.table.take(some)]
        parts.append(prepared)
    table = pyarrow.concat_tables(tables)
    counts = parts[0].counts
    for part in parts[1:]:
        counts = counts.plus(part.counts)
    labels = table["labels"].combine_chunks().flatten().to_numpy()
    counts.tokens, counts.trained_tokens = len(labels), int((labels != IGNORED).sum())
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:32]
    first = [row for rows in zip_longest(*(part.first for part in parts)) for row in rows if row is not None]
    commits = [part.commit for part in parts if part.commit]
    return Prepared(Dataset(table), first[:FIRST], counts, fingerprint, ", ".join(commits) or None)


def prepare(source: sources.Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Everything the source has, ready to train on; says what to know of it.

    LoraError when a row cannot be used (unless `data.on_bad_row: skip`), or nothing is left to learn from.
    """
    counts = Counts()
    kept = _select(_encoded(source, recipe, tokenizer, counts), recipe, counts)
    gc.freeze()  # else each of many collections walks all that the libraries have made
    try:
        first = list(islice(kept, FIRST))
        table = _table(chain(first, kept))
    finally:
        gc.unfreeze()
    if counts.read == 0:
        where = f"split {source.split} of " if source.split != "train" else ""
        raise LoraError(f"data.path: {where}{source.name} holds no row", f"head {source.name}")
    _say_bad_rows(recipe.data, counts)
    if not len(table):
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.left_out.items() if number)
        too_long = any("tokens" in reason or "cut off" in reason for reason in counts.left_out)
        hint = f"--set training.max_length={max(counts.lengths)}" if too_long else "look at the rows"
        raise LoraError(f"no row is left to train on: {counts.read} read ({reasons})", hint)
    _warn(tokenizer, counts, len(table))
    return Prepared(Dataset(table), first, counts, source.fingerprint(), source.commit)


def stream(source: sources.Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[Kept]:
    """The rows as they come, none kept."""
    counts = Counts()
    yield from _select(_encoded(source, recipe, tokenizer, counts), recipe, counts)
    _say_bad_rows(recipe.data, counts)


def _table(rows: Iterator[Kept]) -> pyarrow.Table:
    """The ids and labels in columns, eight bytes a token."""
    numbers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema({"input_ids": numbers, "labels": numbers})
    batches = []
    while batch := list(islice(rows, sources.BATCH)):
        ends = np.cumsum([0, *(len(row.input_ids) for row in batch)], dtype=np.int32)
        columns = [np.concatenate([row.input_ids for row in batch]), np.concatenate([row.labels for row in batch])]
        lists = [pyarrow.ListArray.from_arrays(ends, column) for column in columns]
        batches.append(pyarrow.record_batch(lists, schema=schema))
    return pyarrow.Table.from_batches(batches, schema)


def _encoded(
    source: sources.Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, counts: Counts
) -> Iterator[tuple[str, list[Encoded]]]:
    """The usable rows with their places; bad ones are counted. Once one is an error, the rest is only looked at."""
    data = recipe.data
    rows: Iterator[tuple[str, sources.Row]] = islice(source.rows(), data.max_rows)
    first = list(islice(rows, COLUMNS_FROM))
    columns = list(dict.fromkeys(name for _, row in first if not isinstance(row, BadRow) for name in row))
    style = _format(data, columns) if columns else "text"
    convert = formats.converter(style, formats.uses_alpaca(tokenizer.chat_template))
    renderer = Renderer(tokenizer, data.train_on)
    batches = _converted(chain(first, rows), convert, data, counts)
    for batch, made in renderer.encode(batches):
        for (place, _), found in zip(batch, made):
            if isinstance(found, BadRow):
                _count_bad(counts, place, found)
            else:
                yield place, found


def _converted(
    rows: Iterator[tuple[str, sources.Row]], convert: formats.Converter, data: Data, counts: Counts
) -> Iterator[Batch]:
    """The usable rows, in batches; none any more once a bad one is an error."""
    while read := list(islice(rows, sources.BATCH)):
        counts.read += len(read)
        batch: Batch = []
        for place, row in read:
            try:
                if isinstance(row, BadRow):
                    raise row
                batch.append((place, convert(_renamed(row, data.columns) if data.columns else row)))
            except BadRow as bad:
                _count_bad(counts, place, bad)
        if batch and not (counts.first_bad and data.on_bad_row == "error"):
            yield batch


def _count_bad(counts: Counts, place: str, bad: BadRow) -> None:
    counts.bad[bad.kind] += 1
    counts.first_bad = counts.first_bad or (place, bad)


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
    shapes = "; ".join(f"{style}: {', '.join(needed)}" for style, needed in formats.FORMATS.items())
    raise LoraError(
        f"data.path: the columns {', '.join(columns)} are of no known format ({shapes})",
        f"--set data.columns='{{prompt: {columns[0]}, completion: {columns[-1]}}}'",
    )


def _missing_column(column: str, columns: list[str], where: str) -> LoraError:
    guess = nearest(column, columns)
    hint = f"did you mean {guess}?" if guess else "data.columns: {ours: theirs} names them"
    return LoraError(f"{where}: there is no column {column}; there are {', '.join(columns)}", hint)


def _select(encoded: Iterator[tuple[str, list[Encoded]]], recipe: Recipe, counts: Counts) -> Iterator[Kept]:
    """The rows to train on: those with something to learn, long ones treated as data.on_long_row says."""
    limit, policy = recipe.training.max_length, recipe.data.on_long_row
    for place, found in encoded:
        counts.by_turn += len(found) > 1
        for row in found:
            counts.lengths[len(row.input_ids)] += 1
            counts.control_in_text += row.control_in_text
            if not (row.labels != IGNORED).any():
                counts.left_out["dropped: nothing to learn"] += 1
                continue
            if len(row.input_ids) <= limit:
                counts.ends[int(row.labels[row.labels != IGNORED][-1])] += 1
                pieces = [(row.input_ids, row.labels)]
            else:
                pieces = _fitted(place, row, limit, policy, counts)
            for ids, labels in pieces:
                counts.tokens += len(ids)
                counts.trained_tokens += int((labels != IGNORED).sum())
                yield Kept(place, ids, labels)


def _fitted(place: str, row: Encoded, limit: int, policy: str, counts: Counts) -> list[tuple[NDArray, NDArray]]:
    """What is left of a row that is too long, with something to learn in each piece."""
    length = len(row.input_ids)
    if policy == "error":
        raise LoraError(
            f"{place}: {length} tokens, over training.max_length {limit}",
            f"--set training.max_length={length}, or --set data.on_long_row=drop",
        )
    if policy == "drop":
        counts.left_out[f"dropped: over {limit} tokens"] += 1
        return []
    ends = range(0, length if policy == "split" else 1, limit)
    pieces = [(row.input_ids[start : start + limit], row.labels[start : start + limit]) for start in ends]
    taught = [piece for piece in pieces if (piece[1] != IGNORED).any()]
    if not taught:
        counts.left_out["dropped: the answer was cut off whole"] += 1
    elif policy == "split":
        counts.left_out[f"split at {limit} tokens"] += 1
    else:
        counts.left_out[f"cut at {limit} tokens"] += 1
    return taught


def _say_bad_rows(data: Data, counts: Counts) -> None:
    """LoraError, or a warning when they are to be skipped: the first with its place, and how many of each kind."""
    if counts.first_bad is None:
        return
    place, bad = counts.first_bad
    total = sum(counts.bad.values())
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.bad.most_common())
    more = f" ({total} of {counts.read} rows are bad: {kinds})" if total > 1 else ""
    if data.on_bad_row == "error":
        raise LoraError(f"{place}: {bad.said}{more}", bad.hint)
    counts.left_out["dropped: bad"] += total
    ui.warn(f"{total} bad rows of {counts.read} are left out ({kinds}); the first is {place}: {bad.said}")


def stop_ids(tokenizer: PreTrainedTokenizerBase, counts: Counts) -> list[int]:
    """The control tokens that the trained answers end with: where generation is to stop."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(token for token in counts.ends if token in special or token in tokenizer.all_special_ids)


def _warn(tokenizer: PreTrainedTokenizerBase, counts: Counts, kept: int) -> None:
    """What is no error, and what one would want to know before a run."""
    stops = set(stop_ids(tokenizer, counts))
    endless = sum(number for token, number in counts.ends.items() if token not in stops)
    if endless:
        ui.warn(f"{endless} of {kept} rows teach no token that ends the answer: the model may never stop")
    if counts.control_in_text:
        ui.warn(f"{counts.control_in_text} rows have control tokens in their text, which are read as such")
    if counts.by_turn:
        ui.say(f"  {counts.by_turn} conversations became one row for each answer: the template changes earlier turns")
