"""Prepare the rows of one data set: read, recognise, render, encode, select and count them. Both
trainers get the same rows.

They are prepared before the run and kept on disk (`cache.py`). Sets that do not fit there
(`data.streaming`) are prepared while training, over and over, and drawn from a buffer; only their
first rows are looked at before the run. Memory is constant either way.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow
from datasets import Dataset, Features, IterableDataset
from pyarrow import compute

from lora_cli.common import LoraError, UsageError, find_nearest, quote, spell_count, ui
from lora_cli.data import (
    cache,
    classify_pictures,
    column_kinds,
    digests,
    formats,
    pictures,
    readers,
    selection,
    tables,
    unpaired,
)
from lora_cli.data.encode import Batch, Encoded
from lora_cli.data.encoders import Encoder
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.data.preferences import DOCUMENTS
from lora_cli.data.selection import Counts, Kept
from lora_cli.data.sources import Source
from lora_cli.recipe import Column, Data, Recipe

SHOWN = 20
"""How many columns are listed."""
COLUMNS_FROM = 100
"""How many rows, from the first, tell the format by their columns."""
FIRST = 20
"""How many rows are kept with their places, to be shown."""
LABELS_SHOWN = 6
LOOKED_AT = 10_000
"""How many rows of a stream are looked at before training."""
PICTURES = 200
"""The same of pictures, which are held meanwhile."""


class Prepared(NamedTuple):
    """Rows with `input_ids` and `labels`, the first of them with their places, and what became of
    the rows read.

    For a stream, all this describes only its first rows; `stream` yields all of them, without end.
    """

    rows: Dataset
    first: list[Kept]
    counts: Counts
    fingerprint: str
    """A hash of every id and label; for a stream, of the first ones and of each file's first and
    last megabyte."""
    commit: str | None
    stream: IterableDataset | None = None
    names: Sequence[str] = ()
    """What a model tells apart, by the numbers in `counts.labels`."""
    by_token: bool = True
    """Whether each token has a label."""
    is_weighted: bool = False
    """Whether it is of several sets, of which one is there more or less often than it was read."""

    def summarise(self) -> str:
        """Return a line such as `571 of 1000 rows, 229563 tokens, 39% with loss (429 dropped: over
        512 tokens)`."""
        counts = self.counts
        share = 100 * counts.trained_tokens / max(counts.tokens, 1)
        unit = "windows of" if counts.windows else "of"
        read = spell_count(counts.read, "row")
        text = f"{len(self.rows)} {unit} {read}"
        if self.is_weighted:
            text = f"{len(self.rows)} rows by weight from {counts.read}"
        elif len(self.rows) > counts.read and not counts.windows:
            text = f"{len(self.rows)} rows from {counts.read}"
        text += "" if counts.seen else f", {spell_count(counts.tokens, 'token')}"
        if labels := self.summarise_labels():
            text += f", {labels}"
        elif self.by_token or counts.target_lengths:
            text += f", {share:.0f}% with loss"
        if reasons := counts.list_reasons():
            text += f" ({reasons})"
        return f"a stream, of its first rows {text}" if self.stream is not None else text

    def summarise_labels(self) -> str:
        """Return such as `labels: neutral 140 (35%), good 130 (32%)`, most frequent first; empty
        where none are told apart."""
        found = self.counts.labels.most_common(LABELS_SHOWN)
        total = self.counts.labels.total()
        said = [f"{self.names[at]} {number} ({number / total:.0%})" for at, number in found]
        more = len(self.counts.labels) - len(found)
        return f"labels: {', '.join(said)}{f' and {more} more' if more else ''}" if said else ""


def prepare(source: Source, recipe: Recipe, encoder: Encoder) -> Prepared:
    """Return everything the source has, ready to train on, from the cache if it was prepared
    before.

    Raise LoraError when a row cannot be used (unless `data.on_bad_row: skip`), or nothing is left
    to learn from. Warn of what is worth knowing.
    """
    content = _hash_content(source, recipe, encoder)
    key = cache.make_key(content, source.names, recipe, encoder.tokenizer, encoder.day)
    entry = cache.find_folder() / key
    found = cache.read(entry, encoder, recipe.data)
    if found:
        ui.say(f"  {source.name}: prepared before, in {entry}")
    else:
        counts = Counts()
        rows = _select_rows(source, recipe, encoder, counts)
        check = partial(_refuse_useless, source, recipe, counts)
        gc.freeze()  # else each of many collections walks all that the libraries have made
        try:
            schema = cache.make_schema(encoder, recipe.data)
            cache.write(entry, rows, schema, counts, check, FIRST)
        finally:
            gc.unfreeze()
        found = cache.read(entry, encoder, recipe.data)
        assert found, "just written"
    selection.warn_of_counts(encoder, found.counts)
    return Prepared(
        found.rows,
        _show_first_rows(found.rows, found.places),
        found.counts,
        found.digest,
        source.commit,
        names=encoder.names,
        by_token=encoder.by_token,
    )


def prepare_stream(source: Source, recipe: Recipe, encoder: Encoder) -> Prepared:
    """Return the first rows, checked as `prepare` does, and all rows as a stream."""
    counts = Counts()
    notes = cache.Notes(FIRST)
    beginning = take_beginning(recipe)
    schema = cache.make_schema(encoder, recipe.data)
    batches = cache.make_batches(_select_rows(source, beginning, encoder, counts), schema, notes)
    rows = cache.give_format(Dataset(pyarrow.Table.from_batches(batches, schema)), encoder)
    _refuse_useless(source, recipe, counts)
    selection.warn_of_counts(encoder, counts)
    features = Features.from_arrow_schema(schema)
    endless = IterableDataset.from_generator(
        partial(_repeat_rows, source, recipe, encoder, schema.names), features
    )
    if recipe.data.shuffle_buffer > 1:
        endless = endless.shuffle(seed=recipe.training.seed, buffer_size=recipe.data.shuffle_buffer)
    fingerprint = f"{notes.digest}, {source.hash_content(ends_only=True)}"
    first = _show_first_rows(rows, notes.places)
    kinds = encoder.names, encoder.by_token
    return Prepared(rows, first, counts, fingerprint, source.commit, endless, *kinds)


def take_beginning(recipe: Recipe) -> Recipe:
    """Return the recipe with no more rows than are looked at of a stream."""
    looked_at = PICTURES if recipe.task_row.reads_pictures else LOOKED_AT
    most = min(recipe.data.max_rows or looked_at, looked_at)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_rows": most})})


def stream_rows(source: Source, recipe: Recipe, encoder: Encoder) -> Iterator[Kept]:
    """Yield the rows without holding them; after the last, raise LoraError for what `prepare`
    refuses."""
    counts = Counts()
    yield from _select_rows(source, recipe, encoder, counts)
    _refuse_useless(source, recipe, counts)


def _repeat_rows(
    source: Source, recipe: Recipe, encoder: Encoder, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the source's rows from the first to the last, again and again."""
    while True:
        for row in stream_rows(source, recipe, encoder):
            yield {name: row.read(name) for name in columns}


def _show_first_rows(rows: Dataset, places: list[str]) -> list[Kept]:
    """Return the first rows with their places."""
    shown = rows.select(range(len(places)))
    made = []
    for place, row in zip(places, shown):
        ids = np.array(row.get("input_ids", [0]), np.int32)
        beside = {"image": np.uint8, DOCUMENTS: np.int32, unpaired.DESIRABLE: np.int32}
        others = {name: np.asarray(row[name], kind) for name, kind in beside.items() if name in row}
        made.append(Kept(place, ids, np.array(row["labels"]), others))
    return made


def find_lengths(rows: Dataset, column: str = "input_ids") -> NDArray:
    """Return how many tokens each row has in a column of texts; 1 of each picture, as these take
    the same."""
    if column not in rows.column_names:
        return np.ones(len(rows), np.int32)
    parts = rows.with_format("arrow").select_columns([column]).iter(cache.BATCH)
    found = [compute.list_value_length(part[column]).to_numpy() for part in parts]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def _refuse_useless(source: Source, recipe: Recipe, counts: Counts) -> None:
    """Raise LoraError where there was no row, a bad one that must not be skipped, or nothing to
    learn from."""
    if counts.read == 0:
        where = f"split {source.split} of " if source.split != "train" else ""
        raise LoraError(
            f"data.path: {where}{source.name} holds no rows", f"head {quote(source.name)}"
        )
    selection.refuse_bad_rows(recipe.data, counts)
    selection.refuse_nothing(counts)


def _select_rows(
    source: Source, recipe: Recipe, encoder: Encoder, counts: Counts
) -> Iterator[Kept]:
    """Yield the rows to train on without holding them."""
    return selection.select_rows(_encode_rows(source, recipe, encoder, counts), recipe, counts)


class Opened(NamedTuple):
    """The rows of a source, of which the first have told what they are."""

    first: list[tuple[str, readers.Row]]
    others: Iterator[tuple[str, readers.Row]]
    style: str
    """Their format."""
    names: Mapping[str, str]
    """Those of its columns that are called otherwise: ours, theirs."""

    @property
    def rows(self) -> Iterator[tuple[str, readers.Row]]:
        """All of them, with their places."""
        return chain(self.first, self.others)


def open_rows(
    source: Source, data: Data, encoder: Encoder | type[Encoder], quiet: bool = False
) -> Opened:
    """Return the rows that are read of a source. Raises LoraError where no format has their
    columns."""
    rows: Iterator[tuple[str, readers.Row]] = islice(source.read_rows(), data.max_rows)
    first = list[tuple[str, readers.Row]]()
    readable = 0
    while readable < COLUMNS_FROM and len(first) < LOOKED_AT and (row := next(rows, None)):
        first.append(row)
        readable += not isinstance(row[1], BadRow)
    seen = [row for _, row in first if not isinstance(row, BadRow)]
    columns = formats.list_columns(seen)
    try:
        return Opened(first, rows, *choose_format(data, columns, encoder, quiet, seen))
    except UnknownColumns as error:
        known = encoder.row_formats
        raise (tables.find_lack_of_names(source.files, columns, known) or error) from None


def _hash_content(source: Source, recipe: Recipe, encoder: Encoder) -> str:
    """Return a hash of all that is read: of the source, and of the pictures that its rows name."""
    own = source.hash_content()
    if not recipe.task_row.reads_pictures or source.is_of_pictures:
        return own
    opened = open_rows(source, recipe.data, encoder, quiet=True)
    if not any(classify_pictures.find_named(*row, opened.names) for row in opened.first):
        return own
    named = (classify_pictures.find_named(*row, opened.names) for row in opened.rows)
    return f"{own} {pictures.hash_files(filter(None, named))}"


def _encode_rows(
    source: Source, recipe: Recipe, encoder: Encoder, counts: Counts
) -> Iterator[tuple[str, list[Encoded]]]:
    """Yield the usable rows with their places, and count the bad ones.

    Once a bad row is an error, the rest is only read and counted.
    """
    data = recipe.data
    opened = open_rows(source, data, encoder)
    convert = encoder.find_converter(opened.style)
    answers = opened.style in formats.LABELLED  # all are learned as if wanted
    batches = _convert_rows(opened.rows, convert, opened.names, data, counts, answers)
    for batch, made in encoder.encode(batches):
        for (place, row), found in zip(batch, made):
            if isinstance(found, BadRow):
                counts.count_bad(place, found)
            else:
                yield place, digests.add_digest(row, found) if data.holds_out else found


HOPELESS = 10_000
"""Rows after which no more are read, where each was bad and that is an error."""


def _convert_rows(
    rows: Iterator[tuple[str, readers.Row]],
    convert: formats.Converter,
    names: Mapping[str, str],
    data: Data,
    counts: Counts,
    answers: bool,
) -> Iterator[Batch]:
    """Yield the usable rows in batches, their columns renamed by `names` (ours: theirs); none any
    more once a bad row is an error. Of `answers`, those are counted that are not wanted."""
    while read := list(islice(rows, readers.BATCH)):
        counts.read += len(read)
        batch: Batch = []
        for place, row in read:
            try:
                if isinstance(row, BadRow):
                    raise row
                ours = formats.rename_columns(row, names) if names else row
                batch.append((place, convert(ours)))
                counts.unwanted += answers and unpaired.read_label(row) is False
            except BadRow as bad:
                counts.count_bad(place, bad)
        if data.on_bad_row == "skip" or not counts.first_bad:
            if batch:
                yield batch
        elif counts.read == sum(counts.bad.values()) >= HOPELESS:
            return


class UnknownColumns(LoraError):
    """Columns of which no format is made."""


def _refuse_other_format(data: Data, known: formats.Formats) -> None:
    """Raise UsageError for a format of rows that the recipe's task has not."""
    if data.format not in ("auto", *known):
        raise UsageError(
            f"data.format: {data.format} is none of this task's; they are {', '.join(known)}",
            "leave it out",
        )


def choose_format(
    data: Data,
    columns: list[str],
    encoder: Encoder | type[Encoder],
    quiet: bool = False,
    rows: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, Mapping[str, str]]:
    """Return the format of the rows, the recipe's or the one that their columns tell, and the names
    of its columns as `ours: theirs`. Raises UnknownColumns, which says what is in the columns of
    `rows`, the first of them."""
    known = encoder.row_formats
    if not columns:  # no row can be read
        return next(reversed(list(known))), {}
    _refuse_other_format(data, known)
    for theirs in data.columns.values():
        if not formats.is_column(theirs, columns):
            raise _explain_missing_column(theirs, columns, "data.columns")
    names: Mapping[Any, str] = data.columns
    if not names and data.format == "auto":
        names = formats.guess_columns(columns, known, encoder.column_sets)
    named = formats.name_columns(columns, names)
    if data.format != "auto":
        for column in known[data.format]:
            if column not in named:
                raise _explain_missing_column(column, named, f"data.format: {data.format}")
        return data.format, names
    if style := formats.recognise_format(named, known):
        if not quiet:
            _say_columns(names, named, by_hand=bool(data.columns))
        return style, names
    raise _explain_unknown(columns, encoder, rows)


def _explain_unknown(
    columns: list[str], encoder: Encoder | type[Encoder], rows: Sequence[Mapping[str, Any]]
) -> UnknownColumns:
    """Return the error for columns of which no format is made."""
    known, kinds = encoder.row_formats, column_kinds.tell_kinds(rows)
    shapes = "; ".join(f"{style}: {', '.join(needed)}" for style, needed in known.items())
    more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
    shown = column_kinds.describe(columns[:SHOWN], kinds)
    return UnknownColumns(
        f"data.path: the columns {shown}{more} match no known format ({shapes})",
        column_kinds.suggest(columns, kinds, rows, encoder),
    )


def _say_columns(names: Mapping[Any, str], named: list[str], by_hand: bool) -> None:
    """Say which columns are read as ours; where a user has named some, which are not read."""
    if names and not by_hand:
        read = ", ".join(f"{theirs} as {ours}" for ours, theirs in names.items())
        ui.say(f"  columns: {read}")
    unread = [name for name in named if name not in get_args(Column)]
    if by_hand and unread:
        ui.say(f"  columns that are not read: {', '.join(unread)}")


def _explain_missing_column(column: str, columns: list[str], where: str) -> LoraError:
    """Return the error for a column that is not there."""
    guess = find_nearest(column, columns)
    hint = f"did you mean {guess}?" if guess else "data.columns: {ours: theirs} names them"
    return LoraError(f"{where}: there is no column {column}; there are {', '.join(columns)}", hint)
