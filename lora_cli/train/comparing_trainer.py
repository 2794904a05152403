"""What trainers of preferences have in common: the loss is lora's own, a mean over a step's
examples, however these are dealt and cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_cli.recipe import Preference
from lora_cli.train.objectives import WatchedTrainer
from lora_cli.train.options import RunOptions


class ComparingTrainer(WatchedTrainer):
    """Trainer, watched, whose step is counted in examples and not in tokens."""

    count_examples: Callable[[Mapping[str, Any]], int]
    """How many examples a batch has."""

    def __init__(self, options: RunOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self.model_accepts_loss_kwargs = True  # the examples of a step are counted

    @property
    def preference(self) -> Preference:
        """What is made of an example."""
        assert self.options.preference is not None
        return self.options.preference

    def _settle_stock_loss(self) -> None:
        """Take the logits of the model where lora's own loss head does not suit it."""
        self.own_loss = True

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counts = [torch.zeros(self.count_examples(each)) for each in batch_samples]
        counted = [{**batch, "shift_labels": each} for batch, each in zip(batch_samples, counts)]
        return super()._get_num_items_in_batch(counted, device)
