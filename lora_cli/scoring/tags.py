"""Score what is said of each word: a tag."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lora_cli.models import IGNORED
from lora_cli.scoring import metrics
from lora_cli.scoring.metrics import Scores
from lora_cli.scoring.scorer import Beside, Scorer


class TagScorer(Scorer):
    """Scores models that tag words: `logits` (rows, length, tags), `labels` (rows, length), -100
    but at the first token of each word."""

    def sum_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the cross-entropy of the tags of words."""
        return functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )

    def make_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the first tag for each token."""
        return logits.new_zeros(logits.shape[:2], dtype=torch.long)

    def read(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> list[Any]:
        """Return for each row with words the numbers of its tags as said, and as they are right."""
        likeliest, kept = logits.argmax(-1), labels != IGNORED
        rows = [at for at in range(len(labels)) if kept[at].any()]
        return [(likeliest[at][kept[at]].tolist(), labels[at][kept[at]].tolist()) for at in rows]

    def score_all(self, gathered: list[Any]) -> Scores:
        """Return the metrics of entities, or of tags that name none."""
        said, right = (
            [[self.labels[number] for number in row] for row in side] for side in zip(*gathered)
        )
        return metrics.score_tags(said, right)
