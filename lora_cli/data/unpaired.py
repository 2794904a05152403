"""Encode answers of which each is marked as wanted or not: one conversation in a row, and a switch.

Beside its own answer, such a row is trained with one that answers another prompt: how much likelier
a model has made any answer at all is told by these. Which row lends its answer hangs on the rows
alone, in their order: neither on the batches that they are drawn to nor on who computes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, spell_count
from lora_cli.data import formats
from lora_cli.data.encode import Batch, Encoded, Made, Renderer
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED
from lora_cli.recipe import Preference, Recipe

DESIRABLE = "desirable"
"""The column with 1 of a row whose answer is wanted, 0 of others."""
BATCH = 1000


class UnpairedEncoder(Renderer):
    """Encodes rows with one answer each that is wanted or not."""

    row_formats: ClassVar[formats.Formats] = {"unpaired": ("label",)}
    column_sets: ClassVar[formats.ColumnSets] = ({"label": "kto_tag"},)
    columns: Mapping[str, Any] = MappingProxyType(
        {"input_ids": np.int32, "labels": np.int32, DESIRABLE: np.int32}
    )

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        super().__init__(tokenizer, recipe.data.train_on, day)

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a prompt, an answer and its mark among columns of other
        names."""
        prompt, completion, label = [*columns, "COLUMN", "COLUMN"][:3]
        return formats.suggest_columns(prompt=prompt, completion=completion, label=label)

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""
        waiting = list[Batch]()

        def walk_conversations() -> Iterator[Batch]:
            for batch in batches:
                waiting.append(batch)
                yield [(place, row.answer) for place, row in batch]

        for _, made in super().encode(walk_conversations()):
            batch = waiting.pop(0)
            yield batch, [_mark(row, found) for (_, row), found in zip(batch, made)]


def find_label(row: Mapping[str, Any]) -> str | None:
    """Return the column in which a row says whether its answer is wanted, or None."""
    names = ("label", *(names["label"] for names in UnpairedEncoder.column_sets))
    return next((name for name in names if formats.read_switch(row.get(name)) is not None), None)


def read_label(row: Mapping[str, Any]) -> bool | None:
    """Return whether a row says of its answer that it is wanted, or is not; None where it says
    nothing."""
    column = find_label(row)
    return None if column is None else formats.read_switch(row[column])


def _mark(row: formats.Unpaired, found: list[Encoded] | BadRow) -> list[Encoded] | BadRow:
    """Return an encoded answer with whether it is wanted."""
    if isinstance(found, BadRow):
        return found
    if len(found) != 1:
        return BadRow("the chat template changes earlier turns of a row with a label")
    marked = {**found[0].others, DESIRABLE: np.array([row.desirable], np.int32)}
    taught = bool((found[0].labels[1:] != IGNORED).any())
    dropped = found[0].dropped or ("" if taught else "dropped: an answer without loss")
    return [found[0]._replace(others=marked, dropped=dropped)]


class Kinds(NamedTuple):
    """How many rows have an answer that is wanted, and one that is not."""

    desirable: int
    undesirable: int

    def __str__(self) -> str:
        return f"{self.desirable:,} desirable, {self.undesirable:,} undesirable"


def count_kinds(rows: Dataset) -> Kinds:
    """Return how many rows are of each kind."""
    parts = rows.with_format("arrow").select_columns([DESIRABLE]).iter(BATCH)
    wanted = sum(int(part[DESIRABLE].combine_chunks().flatten().to_numpy().sum()) for part in parts)
    return Kinds(wanted, len(rows) - wanted)


BALANCED = (3 / 4, 4 / 3)
"""How many times as much as the others all desirable answers should count; by eq. 8 of Ethayarajh
et al. 2024, at least 1."""


def describe_balance(rows: Dataset, preference: Preference) -> str:
    """Return how many answers to train on are of each kind, and the weight by which both would
    count alike, where they do not."""
    kinds = count_kinds(rows)
    few, many = sorted(kinds)
    weights = preference.desirable_weight, preference.undesirable_weight
    ratio = kinds.desirable * weights[0] / (kinds.undesirable * weights[1])
    if BALANCED[0] <= ratio <= BALANCED[1]:
        return str(kinds)
    name = "undesirable" if kinds.desirable > kinds.undesirable else "desirable"
    other = weights[0] if name == "undesirable" else weights[1]
    weight = f"--set preference.{name}_weight={other * many / few:.3g}"
    return f"{kinds}, which count {ratio:.3g} times as much together; {weight} evens that"


def refuse_one_kind(rows: Dataset) -> None:
    """Raise LoraError for rows to train on that have no answer to be told apart from others, or no
    prompt that an answer does not belong to."""
    kinds, several = count_kinds(rows), spell_count(len(rows), "row")
    if not (kinds.desirable and kinds.undesirable):
        said, lacking = ("true", "undesirable") if kinds.desirable else ("false", "desirable")
        alone = "; the wanted answers alone are learnt by --set objective=sft" * bool(
            kinds.desirable
        )
        raise LoraError(
            f"label is {said} in all of {several} to train on: objective: kto needs {lacking} "
            "answers as well",
            f"add rows whose label is {'false' if kinds.desirable else 'true'}{alone}",
        )
    _refuse_one_prompt(rows, "train", "add rows of other prompts")


def _refuse_one_prompt(rows: Dataset, purpose: str, hint: str) -> None:
    """Raise LoraError for rows without a prompt that an answer does not belong to."""
    if len(np.unique(_number_prompts(rows))) == 1:
        several = f"all of {len(rows):,} rows to {purpose} on have the same prompt"
        one = f"there is one row to {purpose} on"
        raise LoraError(
            f"{several if len(rows) > 1 else one}: objective: kto holds answers against those to "
            "other prompts",
            hint,
        )


def refuse_evaluation(rows: Dataset, recipe: Recipe) -> None:
    """Raise LoraError for rows to evaluate on that have one prompt, or that lack the kind of
    answers of which the metric is that tells the best step: that would be known after training."""
    held = {"eval_rows": recipe.data.eval_rows, "eval_fraction": recipe.data.eval_fraction}
    more = [f"a larger data.{key}" for key, number in held.items() if number is not None]
    _refuse_one_prompt(rows, "evaluate", more[0] if more else "add rows of other prompts")
    metric = str(getattr(recipe.training, "metric_for_best_model", None)).removeprefix("eval_")
    for kind, number in count_kinds(rows)._asdict().items():
        if not number and metric in ("rewards_margin", f"rewards_{kind}", f"logps_{kind}"):
            place = recipe.where("training", "metric_for_best_model")
            said = "false" if kind == "desirable" else "true"
            raise LoraError(
                f"{place}: {metric} needs {kind} answers, and label is {said} in all of "
                f"{spell_count(len(rows), 'row')} to evaluate on",
                "--set training.metric_for_best_model=loss, or evaluate on rows of both kinds",
            )


def match_answers(rows: Dataset) -> NDArray:
    """Return for each row the place of the row whose answer it is held against (rows): one with
    another prompt, of which there are two at least.

    Rows stand in the order of their prompts, each prompt where it first comes, and borrow from so
    many rows before them as have the most frequent one. So each answer is lent once, as long as
    that prompt has no more than half of the rows; those of its rows for which that leaves none
    borrow in turn. Where no prompt comes twice, it is from the row before, as in TRL.
    """
    prompts = _number_prompts(rows)
    order = np.argsort(prompts, kind="stable")
    sizes = np.bincount(prompts)
    moved = order[(np.arange(len(rows)) - sizes.max(initial=0)) % max(len(rows), 1)]
    found = np.empty(len(rows), np.int64)
    found[order] = moved
    own = np.flatnonzero(prompts[found] == prompts)
    others = np.flatnonzero(prompts != prompts[own[0]]) if len(own) else own
    if len(others):  # only the most frequent prompt can be met again
        found[own] = others[np.arange(len(own)) % len(others)]
    return found


def _number_prompts(rows: Dataset) -> NDArray:
    """Return a number for the prompt of each row (rows), in the order in which they first come."""
    numbers: dict[bytes, int] = {}
    found = list[int]()
    for batch in rows.with_format("arrow").select_columns(["input_ids", "labels"]).iter(BATCH):
        column, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
        ids, learned = column.flatten().to_numpy(), labels.flatten().to_numpy() != IGNORED
        ends = column.offsets.to_numpy() - column.offsets[0].as_py()
        for start, end in pairwise(ends):
            prompt = ids[start : start + int(np.argmax(learned[start:end]))].tobytes()
            key = hashlib.blake2b(prompt, digest_size=16).digest()
            found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found, np.int64)


def exchange_answer(
    row: Mapping[str, Any], other: Mapping[str, Any], longest: int
) -> dict[str, Sequence[int]]:
    """Return the ids and labels of a row's prompt with the answer of another row, cut at `longest`
    tokens."""
    cut = _find_answer(row)
    from_ = _find_answer(other)
    return {
        name: [*row[name][:cut], *other[name][from_:]][:longest] for name in ("input_ids", "labels")
    }


def _find_answer(row: Mapping[str, Any]) -> int:
    """Return the place of the first token with loss."""
    return next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
