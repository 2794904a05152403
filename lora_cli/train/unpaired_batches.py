"""Put answers that are each wanted or not together to a batch, with those that they are held
against.

A row comes with its own answer, which is learnt, and `mismatched`: its prompt with the answer of
another row, of which the model is only asked how likely it is. Both are made to sequences, or
padded, each for themselves; the second is a batch of its own under that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from lora_cli.data import preferences, unpaired
from lora_cli.train.pair_batches import REFERENCE, ComparedPairs, PaddedPairs, PairSteps

MISMATCHED = "mismatched"
"""The key of a row, and of a batch, with the same prompts and others' answers."""


class EachAnswer(torch.utils.data.Dataset[dict[str, Any]]):
    """The answers of all rows, and then those that they are held against, cut at `longest`
    tokens."""

    def __init__(self, rows: Dataset, longest: int) -> None:
        self.rows, self.longest = rows, longest
        self.matched = unpaired.match_answers(rows)

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        turn, at = divmod(place, len(self.rows))
        row: Mapping[str, Any] = self.rows[at]
        found = {name: row[name] for name in ("input_ids", "labels")}
        if turn:
            other = self.rows[int(self.matched[at])]
            found = unpaired.exchange_answer(row, other, self.longest)
        return {**found, preferences.DOCUMENTS: [len(found["input_ids"])]}


class HeldAgainst(ComparedPairs):
    """Rows with what each is held against, and with the log-probabilities (rows, 2) that both
    answers had at the start."""

    def __init__(self, rows: Dataset, reference: torch.Tensor, longest: int) -> None:
        super().__init__(rows, reference)
        self.answers = EachAnswer(rows, longest)

    def __getitem__(self, place: int) -> dict[str, Any]:
        own, other = (
            {**self.answers[at], REFERENCE: [float(number)]}
            for at, number in zip((place, place + len(self.rows)), self.reference[place])
        )
        wanted = self.rows[place][unpaired.DESIRABLE]
        return {**own, unpaired.DESIRABLE: wanted, MISMATCHED: other}


class Steps(PairSteps):
    """Joins the rows of a step to sequences, and apart from them those that they are held
    against."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__(rows) | _join_mismatched(super().__call__, rows)


class PaddedRows(PaddedPairs):
    """Fills rows at their ends, and apart from them those that they are held against."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__(rows) | _join_mismatched(super().__call__, rows)


def _join_mismatched(collate: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the batch of what rows are held against; nothing where none is."""
    if not any(MISMATCHED in row for row in rows):
        is_empty = preferences.DOCUMENTS not in rows[0]  # of a process that has no row
        return {MISMATCHED: collate(list(rows))} if is_empty else {}
    return {MISMATCHED: collate([row[MISMATCHED] for row in rows])}


def take_own(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without what its rows are held against."""
    return {name: value for name, value in batch.items() if name != MISMATCHED}
