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
from lora_cli.models import IGNORED, decoder, read_logits
from lora_cli.recipe import Recipe
from lora_cli.scoring import Scorer, losses
from lora_cli.speed import dora_norms
from lora_cli.train.objectives import WatchedSFTTrainer, WatchedTrainer
from lora_cli.train.options import RunOptions
from lora_cli.train.preference_trainer import PreferenceTrainer
from lora_cli.train.trainers import Watched
from lora_cli.train.unpaired_trainer import UnpairedTrainer


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
        if not self.scorer.has_perplexity:
            del output.metrics[f"{metric_key_prefix}_perplexity"]
        scores = ranks.share(self.scorer.score().values)  # each chooses the best step alike
        for name, value in scores.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output


class PairTrainer(TaskTrainer):
    """… for models that read a text and write another: what is scored is what they write, and not
    which tokens they would have written after the right ones."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        targets = float(self.options.work.each * inputs["labels"].numel())
        return super().floating_point_ops(inputs) + targets

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if self.options.written_tokens:
            self.scorer.gathered += self._write(inputs)
        return found

    def _write(self, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return what the model writes for each source of a batch, and its target: the labels as
        the tokenizer decodes them."""
        tokenizer, labels = self.processing_class, inputs["labels"]
        known = (labels != IGNORED).any(dim=1)  # a process without a row has one without labels
        if not known.any():
            return []
        sources = {name: inputs[name][known] for name in ("input_ids", "attention_mask")}
        norms = dora_norms.keep_norms(self.options.dora_layers)
        most = self.options.written_tokens
        with self.compute_loss_context_manager(), norms:
            written = decoder.write_targets(self.model, tokenizer, sources, most)
        kept = [row[row != IGNORED] for row in labels[known]]
        right = [tokenizer.decode(row, skip_special_tokens=True) for row in kept]
        return [(each.text, target) for each, target in zip(written, right)]


TRAINERS = {"sft": WatchedSFTTrainer}
"""By the name of the objective."""


def find_trainer(recipe: Recipe) -> type[Watched]:
    """Return the class that trains the recipe."""
    if recipe.task_row.has_targets:
        return PairTrainer
    if not recipe.task_row.writes_next_tokens:
        return TaskTrainer
    if recipe.objective_row.compares:
        return UnpairedTrainer if recipe.objective_row.unpaired else PreferenceTrainer
    return TRAINERS[recipe.objective_row.name] if recipe.uses_trl else WatchedTrainer
