"""Score what is said of whole rows: a class, several labels at once, or measured values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lora_cli.models import IGNORED
from lora_cli.scoring import losses, metrics
from lora_cli.scoring.metrics import Scores
from lora_cli.scoring.scorer import Beside, Scorer


class ClassScorer(Scorer):
    """Scores models that classify: `logits` (rows, outputs), `labels` (rows, labels of a row)."""

    def sum_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return cross-entropy for classes, binary cross-entropy for several at once, the squared
        distance for measured values."""
        logits = logits.float()
        if not losses.is_measured(self.problem_type):
            return functional.cross_entropy(
                logits,
                labels[:, 0],
                reduction="sum",
                ignore_index=IGNORED,
                label_smoothing=smoothing,
            )
        known = ~labels.isnan()
        wanted = labels.nan_to_num()
        each = (
            functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            if self.problem_type == losses.SEVERAL
            else (logits - wanted).square()
        )
        return (each * known).sum()

    def make_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the first class, or nothing, for each row."""
        if losses.is_measured(self.problem_type):
            return logits.new_zeros(logits.shape, dtype=torch.float32)
        return logits.new_zeros((len(logits), 1), dtype=torch.long)

    def read(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> list[Any]:
        """Return for each row with labels its numbers as said, and as they are right."""
        rows_known = losses.mark_counted(labels)[:, 0] != IGNORED
        logits, labels = logits[rows_known], labels[rows_known]
        if self.problem_type == losses.SEVERAL:
            said, labels = (logits > 0).int(), labels.int()
        elif self.problem_type == losses.NUMBERS:
            said = logits
        else:
            said = logits.argmax(-1, keepdim=True)
        return list(zip(said.tolist(), labels.tolist()))

    def score_all(self, gathered: list[Any]) -> Scores:
        """Return the metrics of classes, of sets of labels or of numbers."""
        said, right = (np.array(side) for side in zip(*gathered))
        if self.problem_type == losses.SEVERAL:
            return metrics.score_label_sets(said.astype(bool), right.astype(bool), self.labels)
        if self.problem_type == losses.NUMBERS:
            return metrics.score_numbers(said, right)
        return metrics.score_classes(said[:, 0].astype(int), right[:, 0].astype(int), self.labels)
