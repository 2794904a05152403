"""What the loss of a task other than writing is counted by: rows, tokens, or values.

The sums of all passes of a step, divided by all that was counted in it, are the loss of the step,
whatever its passes are. transformers' models divide by what one pass has.
"""

from __future__ import annotations

import torch

from lora_cli.models import IGNORED

SEVERAL = "multi_label_classification"
NUMBERS = "regression"


def is_measured(problem_type: str | None) -> bool:
    """Return whether labels are numbers that outputs are to be near, and not classes."""
    return problem_type in (SEVERAL, NUMBERS)


def mark_counted(labels: torch.Tensor) -> torch.Tensor:
    """Return labels that are -100 where nothing is counted, as transformers counts them."""
    if not labels.is_floating_point():
        return labels
    return torch.where(labels.isnan(), IGNORED, 0)


def count_labels(labels: torch.Tensor) -> int:
    """Return over how many labels a loss is summed."""
    return int((mark_counted(labels) != IGNORED).sum())
