"""Load the rows a recipe trains on and evaluates on: one data set, or several mixed by weight."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import reduce
from itertools import chain, islice, pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

from lora_cli.common import LoraError, UsageError, spell_count, ui
from lora_cli.data import cache, holdout, prepare, selection, sources, unpaired
from lora_cli.data.digests import DIGEST
from lora_cli.data.encode import Renderer
from lora_cli.data.encoders import Encoder
from lora_cli.data.formats import BadRow
from lora_cli.data.preferences import PreferenceEncoder
from lora_cli.data.selection import Counts
from lora_cli.data.unpaired import UnpairedEncoder
from lora_cli.models import Reader
from lora_cli.recipe import Recipe, Rows, Task


def find_encoder(task: Task) -> type[Encoder]:
    """Return the class that makes the rows of a task ready to train on."""
    if task.writes_next_tokens:
        return Renderer
    module, _, name = task.encoder.partition(".")
    found: type[Encoder] = getattr(importlib.import_module(f"lora_cli.data.{module}"), name)
    return found


def make_encoder(recipe: Recipe, reader: Reader, day: date | None = None) -> Encoder:
    """Return what makes the rows of a settled recipe ready to train on."""
    if recipe.objective_row.compares:
        compared = UnpairedEncoder if recipe.objective_row.unpaired else PreferenceEncoder
        return compared(reader, recipe, day)
    if recipe.task_row.writes_next_tokens:
        return Renderer(reader, recipe.data.train_on, day)
    kind: Any = find_encoder(recipe.task_row)
    made: Encoder = kind(reader, recipe, day)
    return made


def load_rows(
    recipe: Recipe, tokenizer: Reader, day: date | None = None
) -> tuple[prepare.Prepared, prepare.Prepared | None]:
    """Return the rows to train on and, where the recipe names any, those to evaluate on.

    `day` is the date for chat templates that write one: a resumed run trains on the rows it began
    with.
    """
    encoder = make_encoder(recipe, tokenizer, day)
    if recipe.task_row.writes_next_tokens and "strftime_now" in str(tokenizer.chat_template):
        ui.say(f"  the chat template writes the date into every conversation: {encoder.day}")
    train, evaluation = _load_both(recipe, encoder)
    if recipe.objective_row.unpaired:
        unpaired.refuse_one_kind(train.rows)
        if evaluation:
            unpaired.refuse_evaluation(evaluation.rows, recipe)
        ui.say(f"  {unpaired.describe_balance(train.rows, recipe.preference)}")
    if (
        isinstance(encoder, Renderer)
        and encoder.adds_bos
        and all(row.input_ids[0] != encoder.tokenizer.bos_token_id for row in train.first)
    ):
        ui.warn(
            f"rows do not begin with {encoder.tokenizer.bos_token}: the tokenizer would add it, "
            "but the chat template does not write it"
        )
    if evaluation and (both := _count_shared(train.rows, evaluation.rows)):
        ui.warn(
            f"{both} of {spell_count(len(evaluation.rows), 'evaluation row')} "
            f"{'is' if both == 1 else 'are'} trained on as "
            "well"
        )
    return train, evaluation


class Held(NamedTuple):
    """Rows that were held out of training, as they are in their files, with their places."""

    rows: list[tuple[str, dict[str, Any]]]
    fingerprint: str
    """That of the rows that the run evaluates on."""


def read_held_rows(recipe: Recipe, tokenizer: Reader, day: date | None = None) -> Held:
    """Return what `data.eval_fraction` or `data.eval_rows` of a settled recipe holds out of
    training; `day` as in `load_rows`."""
    encoder = make_encoder(recipe, tokenizer, day)
    own = _list_parts(recipe)
    parts = [_load_part(each, encoder, where) for where, each in own]
    unseen = holdout.find_held(parts, recipe)
    held = _join_held(holdout.split(parts, recipe).held, encoder)
    found = list[tuple[str, dict[str, Any]]]()
    for where, each in own:
        assert each.data.path is not None
        source = sources.find_source(each.data, where, each.data.path, each.data.split)
        looked_at = prepare.take_beginning(each) if each.data.streaming else each
        places = {
            row.place
            for row in prepare.stream_rows(source, looked_at, encoder)
            if int(row.others[DIGEST][0]) in unseen
        }
        rows = islice(source.read_rows(), looked_at.data.max_rows)
        found += [
            (place, row) for place, row in rows if place in places and not isinstance(row, BadRow)
        ]
    return Held(found, held.fingerprint)


def _list_parts(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Return the recipe of each data set, with its key: of a mix, each alone."""
    data = recipe.data
    if not data.mix:
        return [("path", recipe)]
    made = []
    for number, rows in enumerate(data.mix):
        own = data.model_copy(update={**dict(rows), "mix": None})
        made.append((f"mix.{number}.path", recipe.model_copy(update={"data": own})))
    return made


def _load_both(
    recipe: Recipe, encoder: Encoder
) -> tuple[prepare.Prepared, prepare.Prepared | None]:
    """Return the rows to train on, and those to evaluate on: others, or some that are held out."""
    data = recipe.data
    parts = [_load_part(own, encoder, where) for where, own in _list_parts(recipe)]
    for part, rows in zip(parts, data.mix or []):
        ui.say(f"  {rows.path} x {rows.weight:g}: {part.summarise()}")
    evaluation = None
    if data.holds_out:
        parts, held = holdout.split(parts, recipe)
        evaluation = _join_held(held, encoder)
    elif data.evaluates:
        where = "eval_path" if data.eval_path else "path"
        whole = recipe.model_copy(update={"data": data.model_copy(update={"streaming": False})})
        path, split = data.eval_path or data.path, data.eval_split or "train"
        evaluation = _load_one(whole, encoder, where, path, split)
    return _mix(recipe, encoder, parts, data.mix) if data.mix else parts[0], evaluation


def _count_shared(train: Dataset, evaluation: Dataset) -> int:
    """Return how many rows of `evaluation` are also in `train`, looking at the first million of
    each."""
    trained = set(_walk_hashes(train, 1_000_000))
    return sum(each in trained for each in _walk_hashes(evaluation, 1_000_000))


def _walk_hashes(rows: Dataset, limit: int) -> Iterator[bytes]:
    """Yield a hash of the ids, or of the picture, of each of the first `limit` rows."""
    column = rows.column_names[0]
    first = rows.select(range(min(limit, len(rows)))).select_columns([column])
    size = cache.BATCH if column == "input_ids" else 1
    for batch in first.with_format("arrow").iter(size):
        for chunk in batch[column].chunks:
            ends, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
            for start, end in pairwise(ends):
                read = memoryview(values[start:end]).cast("B")
                yield hashlib.blake2b(read, digest_size=16).digest()


def _load_one(
    recipe: Recipe, encoder: Encoder, where: str, path: str | list[str] | None, split: str
) -> prepare.Prepared:
    """Return the rows of one data set."""
    assert path is not None
    source = sources.find_source(recipe.data, where, path, split)
    return (
        prepare.prepare_stream(source, recipe, encoder)
        if recipe.data.streaming
        else prepare.prepare(source, recipe, encoder)
    )


def _mix(
    recipe: Recipe, encoder: Encoder, parts: Sequence[prepare.Prepared], mix: Sequence[Rows]
) -> prepare.Prepared:
    """Return several data sets as one, each as often as it weighs.

    They stand one after another, since training draws rows at random. Streams are drawn from at
    random, the more often the more they weigh.
    """
    seed = recipe.training.seed
    weights = [rows.weight for rows in mix]
    streams = [part.stream for part in parts if part.stream is not None]
    for part, rows in zip(parts, mix):
        if streams and not len(part.rows):
            raise UsageError(
                f"data.mix: all that is looked at of {rows.path} is held out to evaluate on, and "
                "nothing is left to draw",
                "--set data.streaming=false, or leave it out of the mix",
            )
    if not streams:
        parts = [
            _repeat_by_weight(part, weight, [seed, number], recipe)
            for number, (part, weight) in enumerate(zip(parts, weights))
        ]
    shares = [weight / sum(weights) for weight in weights]
    drawn = interleave_datasets(streams, shares, seed) if streams else None
    weighted = "".join(f"{part.fingerprint} {weight}" for part, weight in zip(parts, weights))
    mixed = _join(parts, encoder)
    if not len(mixed.rows):
        raise LoraError("the weights of data.mix leave no rows", "give one of them a larger weight")
    fingerprint = hashlib.sha256(weighted.encode()).hexdigest()[:32]
    is_weighted = not streams and any(weight != 1 for weight in weights)
    return mixed._replace(stream=drawn, fingerprint=fingerprint, is_weighted=is_weighted)


def _join_held(held: Sequence[prepare.Prepared], encoder: Encoder) -> prepare.Prepared:
    return held[0] if len(held) == 1 else _join(held, encoder)


def _join(parts: Sequence[prepare.Prepared], encoder: Encoder) -> prepare.Prepared:
    """Return the rows of several parts as one, one part after another."""
    in_turn = chain.from_iterable(zip_longest(*(part.first for part in parts)))
    fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode())
    return prepare.Prepared(
        concatenate_datasets([part.rows for part in parts]),
        [row for row in in_turn if row is not None][: prepare.FIRST],
        reduce(Counts.add, (part.counts for part in parts)),
        fingerprint.hexdigest()[:32],
        ", ".join(part.commit for part in parts if part.commit) or None,
        names=encoder.names,
        by_token=encoder.by_token,
    )


def _load_part(recipe: Recipe, encoder: Encoder, where: str) -> prepare.Prepared:
    """Return the rows of a recipe's only data set, which the key `where` names."""
    return _load_one(recipe, encoder, where, recipe.data.path, recipe.data.split)


def _repeat_by_weight(
    part: prepare.Prepared, weight: float, seed: list[int], recipe: Recipe
) -> prepare.Prepared:
    """Return the rows `weight` times, with their tokens counted anew; for a fraction, that share of
    them is drawn at random."""
    times = int(weight)
    size = len(part.rows)
    shuffled = np.random.default_rng(seed).permutation(size)
    drawn = shuffled[: round(weight % 1 * size)]
    some = part.rows.select(np.sort(drawn))
    more = selection.recount(part.counts, some, recipe)
    counts = replace(
        part.counts,
        tokens=times * part.counts.tokens + more.tokens,
        trained_tokens=times * part.counts.trained_tokens + more.trained_tokens,
    )
    return part._replace(rows=concatenate_datasets([part.rows] * times + [some]), counts=counts)
