"""Gather what a model says of the rows it is evaluated on, and score it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lora_cli.models import IGNORED
from lora_cli.recipe import Task
from lora_cli.scoring import losses, metrics
from lora_cli.scoring.metrics import Scores


class Batch(NamedTuple):
    """What was said of some rows, and what would have been right; of tags, those of words alone."""

    said: list[list[float]]
    right: list[list[float]]


class Gathered:
    """The predictions of an evaluation."""

    def __init__(self, task: Task, labels: Sequence[str], problem_type: str | None) -> None:
        self.task, self.labels, self.problem_type = task, list(labels), problem_type
        self.said: list[list[float]] = []
        self.right: list[list[float]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in a batch: logits and labels as `losses.sum_loss` takes them."""
        batch = self._choose(logits.float().cpu(), labels.cpu())
        self.said += batch.said
        self.right += batch.right

    def to_data(self) -> Batch:
        """Return what was gathered here, for `join` elsewhere."""
        return Batch(self.said, self.right)

    def join(self, batches: Sequence[Batch]) -> None:
        """Take in what all processes have gathered, in their order, in place of this one's."""
        self.said = [row for batch in batches for row in batch.said]
        self.right = [row for batch in batches for row in batch.right]

    def _choose(self, logits: torch.Tensor, labels: torch.Tensor) -> Batch:
        if self.task.places_labels:
            likeliest = logits.argmax(-1)
            kept = labels != IGNORED
            rows = [at for at in range(len(labels)) if kept[at].any()]
            return Batch(
                [likeliest[at][kept[at]].tolist() for at in rows],
                [labels[at][kept[at]].tolist() for at in rows],
            )
        rows_known = losses.mark_counted(labels)[:, 0] != IGNORED
        logits, labels = logits[rows_known], labels[rows_known]
        if self.problem_type == losses.SEVERAL:
            return Batch((logits > 0).int().tolist(), labels.int().tolist())
        if self.problem_type == losses.NUMBERS:
            return Batch(logits.tolist(), labels.tolist())
        return Batch(logits.argmax(-1, keepdim=True).tolist(), labels.tolist())

    def score(self) -> Scores:
        """Return the metrics of the task; none where no row was evaluated."""
        if not self.said:
            return Scores({})
        if self.task.places_labels:
            tags = [
                [[self.labels[int(number)] for number in row] for row in rows]
                for rows in (self.said, self.right)
            ]
            return metrics.score_tags(*tags)
        said, right = np.array(self.said), np.array(self.right)
        if self.problem_type == losses.SEVERAL:
            return metrics.score_label_sets(said.astype(bool), right.astype(bool), self.labels)
        if self.problem_type == losses.NUMBERS:
            return metrics.score_numbers(said, right)
        return metrics.score_classes(said[:, 0].astype(int), right[:, 0].astype(int), self.labels)
