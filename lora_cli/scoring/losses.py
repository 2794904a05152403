"""The loss of each task, summed over what it is counted by: rows, tokens, or values.

The sums of all passes of a step, divided by all that was counted in it, are the loss of the step,
whatever its passes are. transformers' models divide by what one pass has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lora_cli.models import IGNORED
from lora_cli.recipe import Task

SEVERAL = "multi_label_classification"
NUMBERS = "regression"


def is_measured(problem_type: str | None) -> bool:
    """Return whether labels are numbers that outputs are to be near, and not classes."""
    return problem_type in (SEVERAL, NUMBERS)


def sum_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    task: Task,
    problem_type: str | None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the loss summed over all labels, in float32: cross-entropy for classes, with so much
    `smoothing`, binary cross-entropy for several at once, the squared distance for measured values.

    `logits` are (rows, outputs), or (rows, length, outputs) where each token has a label; `labels`
    as `TaskCollator` makes them.
    """
    logits = logits.float()
    if task.places_labels:
        logits, labels = logits.flatten(0, 1), labels.flatten()[:, None]
    if not is_measured(problem_type):
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
        if problem_type == SEVERAL
        else (logits - wanted).square()
    )
    return (each * known).sum()


def make_labels(logits: torch.Tensor, task: Task, problem_type: str | None) -> torch.Tensor:
    """Return labels of zeros for these logits, such as a rehearsal takes."""
    if task.places_labels:
        return logits.new_zeros(logits.shape[:2], dtype=torch.long)
    if is_measured(problem_type):
        return logits.new_zeros(logits.shape, dtype=torch.float32)
    return logits.new_zeros((len(logits), 1), dtype=torch.long)


def mark_counted(labels: torch.Tensor) -> torch.Tensor:
    """Return labels that are -100 where nothing is counted, as transformers counts them."""
    if not labels.is_floating_point():
        return labels
    return torch.where(labels.isnan(), IGNORED, 0)


def count_labels(labels: torch.Tensor) -> int:
    """Return over how many labels a loss is summed."""
    return int((mark_counted(labels) != IGNORED).sum())


def read_logits(outputs: Any) -> torch.Tensor:
    """Return what a model of any task says, as transformers gives it."""
    logits = outputs["logits"] if "logits" in outputs else outputs[0]
    assert isinstance(logits, torch.Tensor)
    return logits
