"""Score texts that a decoder has written."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional

from lora_cli.models import IGNORED
from lora_cli.scoring import text_metrics
from lora_cli.scoring.metrics import Scores
from lora_cli.scoring.scorer import Beside, Scorer


class TextScorer(Scorer):
    """Scores models that read a text and write another: `logits` (rows, length, vocabulary),
    `labels` (rows, length), -100 behind each target.

    What is gathered are texts and what they should have been, by whoever lets a model write: which
    tokens are the likeliest after the right ones does not tell what it would write.
    """

    has_perplexity: ClassVar[bool] = True

    def sum_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the cross-entropy of the targets' tokens."""
        return functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )

    def make_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the first token at each place of a target."""
        return logits.new_zeros(logits.shape[:2], dtype=torch.long)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> None:
        """Take nothing of what is said in the place of a target."""

    def read(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> list[Any]:
        """Return nothing, as `add`."""
        return []

    def score_all(self, gathered: list[Any]) -> Scores:
        """Return ROUGE, BLEU, chrF and the share of exact texts."""
        said, right = zip(*gathered)
        return text_metrics.score_texts(said, right)
