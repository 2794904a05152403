"""The trainer of each objective: TRL's, or transformers' own where the recipe asks for that."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from lora_cli.train.trainers import Watched


class WatchedSFTTrainer(Watched, SFTTrainer):
    """TRL's SFTTrainer, watched."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """With `own_loss` the model's (`speed/loss_head.py`), past TRL's head."""
        if not self.own_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)


class WatchedTrainer(Watched, Trainer):
    """transformers' Trainer, watched."""

    own_loss = True
