"""transformers' trainer for tasks other than writing: the task's loss, over all of a step's labels,
and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.distributed import ranks
from lora_cli.recipe import Recipe
from lora_cli.scoring import Gathered, losses
from lora_cli.train.objectives import WatchedSFTTrainer, WatchedTrainer
from lora_cli.train.trainers import Watched


class TaskTrainer(WatchedTrainer):
    """transformers' Trainer, watched, for one of the tasks of the table."""

    gathered: Gathered

    def _settle_stock_loss(self) -> None:
        """Take the loss of the task, divided by the labels of the whole step."""
        self.compute_loss_func = self._compute_task_loss
        self.model_accepts_loss_kwargs = False

    def _compute_task_loss(
        self,
        outputs: Mapping[str, Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        total = losses.sum_loss(
            losses.read_logits(outputs),
            labels,
            self.options.task,
            self._problem_type,
            self.args.label_smoothing_factor if self.model.training else 0.0,
        )
        counted = num_items_in_batch or max(losses.count_labels(labels), 1)
        return total / counted

    @property
    def _problem_type(self) -> str | None:
        return self.model.config.problem_type

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # each label counts: none is that of a next token
        counted = [
            {**batch, "shift_labels": losses.mark_counted(batch["labels"])}
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.obey_amid_evaluation()
        labels = inputs["labels"]
        kwargs["prediction_loss_only"] = False
        loss, logits, _ = Trainer.prediction_step(self, model, dict(inputs), **kwargs)
        number = losses.count_labels(labels)
        if number:
            self.eval_loss += float(loss) * number
            self.eval_tokens += number
        self.gathered.add(logits[0] if isinstance(logits, tuple) else logits, labels)
        return loss if ranks.count() == 1 else None, None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        config = self.model.config
        names = [config.id2label[number] for number in sorted(config.id2label)]
        self.gathered = Gathered(self.options.task, names, self._problem_type)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.gathered.join(ranks.gather(self.gathered.to_data()))
        del output.metrics[f"{metric_key_prefix}_perplexity"]
        scores = self.gathered.score()
        for name, value in scores.values.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output


TRAINERS = {"sft": WatchedSFTTrainer}
"""By the name of the objective."""


def find_trainer(recipe: Recipe) -> type[Watched]:
    """Return the class that trains the recipe."""
    if not recipe.task_row.writes_next_tokens:
        return TaskTrainer
    return TRAINERS[recipe.objective.name] if recipe.uses_trl else WatchedTrainer
