"""Put pairs of answers together to a batch: sequences without padding, or a row for each answer.

Beside a model's inputs a batch names what its loss is made of: `answers`, for each of its sequences
the numbers of labels of the answers in it, chosen and rejected in turn; and, of rows that have it,
`reference` (1, answers of all), how likely each was at the start (`reference.py`). A row may have
one answer as well; `desirable` (1, answers of all) then says of each whether it is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from datasets import Dataset

from lora_cli.data import preferences, unpaired
from lora_cli.models import IGNORED
from lora_cli.speed import step_packing

ANSWERS = "answers"
REFERENCE = "reference"
"""The column of a row, and the key of a batch, with log-probabilities at the start."""
BY_ANSWER = (REFERENCE, unpaired.DESIRABLE)
"""… and all columns with a number for each answer."""
Rows = Sequence[Mapping[str, Any]]


class PairSteps(step_packing.StepCollator):
    """Joins the pairs of a step to sequences; none is parted."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        bins = step_packing.fit_bins([len(row["input_ids"]) for row in rows], self.length)
        grouped = [[rows[place] for place in places] for places in bins]
        return super().__call__(rows) | _describe_answers(grouped)


@dataclass(frozen=True)
class PaddedPairs:
    """Makes two rows of each pair, filled at their ends with `pad` to the length of the longest, or
    a multiple of `multiple`."""

    pad: int
    multiple: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        documents = [part for row in rows for part in _cut(row)]
        longest, multiple = max(len(ids) for ids, _ in documents), self.multiple or 1
        shape = len(documents), -(-longest // multiple) * multiple
        made = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for at, (ids, labels) in enumerate(documents):
            made["input_ids"][at, : len(ids)] = torch.as_tensor(ids)
            made["attention_mask"][at, : len(ids)] = 1
            made["labels"][at, : len(ids)] = torch.as_tensor(labels)
        return made | _describe_answers([rows])


def _cut(row: Mapping[str, Any]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the ids and labels of each of a row's documents."""
    cuts = accumulate(step_packing.list_documents(row), initial=0)
    return [
        (row["input_ids"][start:end], row["labels"][start:end]) for start, end in pairwise(cuts)
    ]


def _describe_answers(grouped: Sequence[Rows]) -> dict[str, Any]:
    """Return what a batch says of the answers in each of its sequences; the row of a process that
    has none is no pair."""
    pairs = [[row for row in rows if preferences.DOCUMENTS in row] for rows in grouped]
    answers = [[count_labels(labels) for row in rows for _, labels in _cut(row)] for rows in pairs]
    every = [row for rows in pairs for row in rows]
    found: dict[str, Any] = {ANSWERS: answers}
    for name in BY_ANSWER:
        if not every or name in every[0]:
            numbers = [number for row in every for number in row[name]]
            found[name] = torch.tensor([numbers], dtype=torch.float32)
    return found


def split(batch: dict[str, Any], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sequences of a batch, which are these inputs of a model, each with its answers."""
    answers = batch[ANSWERS]
    found = [
        {name: value for name, value in part.items() if name not in (ANSWERS, *BY_ANSWER)}
        | {ANSWERS: own}
        for part, own in zip(parts, answers)
    ]
    for name in BY_ANSWER:
        if name in batch:
            numbers = batch[name][0].split([len(each) for each in answers])
            for part, each in zip(found, numbers):
                part[name] = each
    return found


def count_pairs(batch: Mapping[str, Any]) -> int:
    """Return how many pairs a batch has."""
    return count_answers(batch) // 2


def count_answers(batch: Mapping[str, Any]) -> int:
    """Return how many answers a batch has."""
    return sum(len(each) for each in batch[ANSWERS])


class ComparedPairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with the log-probabilities (rows, 2) that their answers had at the start."""

    def __init__(self, rows: Dataset, reference: torch.Tensor) -> None:
        self.rows, self.reference = rows, reference

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.rows[place], REFERENCE: self.reference[place].tolist()}


def count_labels(labels: Sequence[int]) -> int:
    """Return how many labels a document has that something stands before."""
    return sum(label != IGNORED for label in labels[1:])
