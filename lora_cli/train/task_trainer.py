"""transformers' trainer for tasks other than writing: the task's loss, over all of a step's labels,
and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.data import collate
from lora_cli.distributed import ranks
from lora_cli.models import read_logits
from lora_cli.recipe import Recipe
from lora_cli.scoring import Scorer, losses
from lora_cli.train.objectives import WatchedSFTTrainer, WatchedTrainer
from lora_cli.train.options import RunOptions
from lora_cli.train.trainers import Watched


class TaskTrainer(WatchedTrainer):
    """transformers' Trainer, watched, for one of the tasks of the table."""

    mask: torch.Tensor | None = None
    """Which tokens of the batch at hand are no padding."""
    logits: torch.Tensor | None = None
    """What the model said of the batch that is evaluated."""

    def __init__(self, options: RunOptions, args: TrainingArguments, **given: Any) -> None:
        args.label_names = ["labels"]  # whatever the model's own forward calls them
        super().__init__(options, args=args, **given)

    @property
    def scorer(self) -> Scorer:
        """The loss and the metrics of the task."""
        assert self.options.scorer is not None
        return self.options.scorer

    def _settle_stock_loss(self) -> None:
        """Take the loss of the task, divided by the labels of the whole step."""
        self.compute_loss_func = self._compute_task_loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.mask = inputs.get("attention_mask")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_task_loss(
        self,
        outputs: Mapping[str, Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        logits = read_logits(outputs)
        if not self.model.training:
            self.logits = logits.detach()
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = self.scorer.sum_loss(logits, labels, self.mask, smoothing)
        counted = num_items_in_batch or max(losses.count_labels(labels), 1)
        return total / counted

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # each label counts: none is that of a next token
        counted = [
            {**batch, "shift_labels": losses.mark_counted(batch["labels"])}
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        # what is beside a model's inputs is for scoring alone
        scored = description is not None and description.lower() != "training"
        return dataset if scored else super()._remove_unused_columns(dataset, description)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.obey_amid_evaluation()
        inputs = dict(inputs)
        beside, labels = inputs.pop(collate.BESIDE, {}), inputs["labels"]
        kwargs["prediction_loss_only"] = False
        loss, _, _ = Trainer.prediction_step(self, model, inputs, **kwargs)
        number = losses.count_labels(labels)
        if number:
            self.eval_loss += float(loss) * number
            self.eval_tokens += number
        assert self.logits is not None
        self.scorer.add(self.logits, labels, beside)
        return loss if ranks.count() == 1 else None, None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.scorer.begin()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.scorer.join(ranks.gather(self.scorer.gathered))
        self.logits = None
        del output.metrics[f"{metric_key_prefix}_perplexity"]
        scores = ranks.share(self.scorer.score().values)  # each chooses the best step alike
        for name, value in scores.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output


TRAINERS = {"sft": WatchedSFTTrainer}
"""By the name of the objective."""


def find_trainer(recipe: Recipe) -> type[Watched]:
    """Return the class that trains the recipe."""
    if not recipe.task_row.writes_next_tokens:
        return TaskTrainer
    return TRAINERS[recipe.objective.name] if recipe.uses_trl else WatchedTrainer
