"""What the outputs of a task's models are held against: one class for each task, which its row
names."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from lora_cli.recipe import Recipe, Task
from lora_cli.scoring.metrics import Scores

Beside = Mapping[str, torch.Tensor]
"""What a batch has beside its model's inputs, as the task's encoder says: (rows, width), padded
with -1."""


class Scorer(ABC):
    """The loss of a task, and what models say in an evaluation.

    `logits` are what `models.read_logits` gives and `labels` what `TaskCollator` makes. What is
    gathered are plain values, which other processes can be given.
    """

    has_perplexity: ClassVar[bool] = False
    """Whether its loss is that of each token of a text, and so has a perplexity."""

    def __init__(self, labels: Sequence[str] = (), problem_type: str | None = None) -> None:
        self.labels, self.problem_type = list(labels), problem_type
        self.gathered: list[Any] = []

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Scorer:
        """Return the scorer for a settled recipe."""
        labels = recipe.model.labels
        return cls(() if labels == "auto" else labels, recipe.model.problem_type)

    @abstractmethod
    def sum_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the loss summed over all labels, in float32, with so much smoothing of classes;
        `mask` (rows, length) is 0 where a row is padding."""

    @abstractmethod
    def make_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return labels of zeros for these logits, such as a rehearsal takes."""

    @abstractmethod
    def read(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> list[Any]:
        """Return what is said of each row of a batch that has labels, with what would have been
        right."""

    @abstractmethod
    def score_all(self, gathered: list[Any]) -> Scores:
        """Return the metrics of all that was read."""

    def begin(self) -> None:
        """Forget the evaluation before."""
        self.gathered = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> None:
        """Take in a batch."""
        kept = {name: values.cpu() for name, values in beside.items()}
        self.gathered += self.read(logits.float().cpu(), labels.cpu(), kept)

    def join(self, parts: Sequence[list[Any]]) -> None:
        """Take in what all processes have gathered, in their order, in place of this one's."""
        self.gathered = [row for part in parts for row in part]

    def score(self) -> Scores:
        """Return the metrics of the task; none where no row was evaluated."""
        return self.score_all(self.gathered) if self.gathered else Scores({})


def find_scorer(task: Task) -> type[Scorer]:
    """Return the class that scores a task."""
    module, _, name = task.scorer.partition(".")
    found: type[Scorer] = getattr(importlib.import_module(f"lora_cli.scoring.{module}"), name)
    return found


def make_scorer(recipe: Recipe) -> Scorer | None:
    """Return what scores the models of a settled recipe; None for those that foretell tokens."""
    if recipe.task_row.writes_next_tokens:
        return None
    return find_scorer(recipe.task_row).of_recipe(recipe)
