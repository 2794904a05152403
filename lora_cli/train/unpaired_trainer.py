"""transformers' Trainer for answers that are each wanted or not: KTO.

Before a step's gradients the model is asked, without any, how likely it takes the step's prompts
with others' answers to be, in all of its passes and processes. So z is the same for each row of a
step, however these are dealt and cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.distributed import ranks
from lora_cli.speed import dora_norms
from lora_cli.train import pair_batches, preference_trainer, unpaired_batches, unpaired_losses
from lora_cli.train.comparing_trainer import ComparingTrainer
from lora_cli.train.options import RunOptions
from lora_cli.train.unpaired_losses import Answers

Batch = dict[str, Any]


class UnpairedTrainer(ComparingTrainer):
    """Trainer, watched, whose loss is the mean over a step's answers, however these are dealt and
    cut."""

    count_examples = staticmethod(pair_batches.count_answers)
    sums: torch.Tensor
    """What is said of the answers since the last line in metrics.jsonl."""
    divergence: torch.Tensor
    """z of the step at hand."""
    begun: list[Answers] | None = None
    """The first answers that are trained on, until they are looked at."""

    def __init__(self, options: RunOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self.sums = torch.zeros(unpaired_losses.NUMBERS, device=self.args.device)
        self.waiting = list[Batch]()  # what the next step's rows are held against
        self.scored, self.held_against = list[Answers](), list[Answers]()
        if options.checks_start:
            self.begun = []

    def _split_parts(self, inputs: Batch) -> list[Batch]:
        own = unpaired_batches.take_own(inputs)
        return pair_batches.split(own, super()._split_parts(own))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        self.waiting = [batch[unpaired_batches.MISMATCHED] for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step:
            self.begun = None
        if self.waiting:
            self.divergence = self._estimate_divergence(model, self.waiting)
            self.waiting = []
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.begun:
            self._judge_start(self.begun)
            self.begun = None
        return loss

    def _estimate_divergence(self, model: Any, batches: Iterable[Batch]) -> torch.Tensor:
        """Return z of the rows of a step, of all processes. Nothing is dropped for it: it costs no
        random numbers, and is held against a start for which nothing was."""
        total, number = torch.zeros(2, device=self.args.device)
        model.eval()
        with torch.no_grad(), dora_norms.keep_norms(self.options.dora_layers):
            for batch in batches:
                for part in self._even_passes(self._split_parts(self._prepare_inputs(batch))):
                    with self.compute_loss_context_manager():
                        answers = unpaired_losses.score_answers(model, part, self.has_loss_head)
                    total, number = total + answers.ratios.sum(), number + len(answers.ratios)
        model.train()
        return self._join_estimates(total, number)

    def _join_estimates(self, total: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Return z by the sums of each process."""
        total, number = ranks.add_up(torch.stack([total, number]).double())
        return unpaired_losses.estimate_divergence(total, number).to(self.args.device).float()

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of some answers, divided by the number of the whole step's."""
        answers = unpaired_losses.score_answers(model, inputs, self.has_loss_head)
        losses = unpaired_losses.compute_losses(answers, self.divergence, self.preference)
        self.sums += unpaired_losses.describe_answers(
            answers, losses, self.divergence, self.preference
        )
        if self.begun is not None:
            self.begun.append(answers._replace(logps=answers.logps.detach()))
        assert num_items_in_batch is not None
        # accelerate takes the mean over the processes
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def _judge_start(self, begun: list[Answers]) -> None:
        """Say the loss before anything is learnt; see `preference_trainer.judge_start`."""
        answers = Answers(*(torch.cat(each) for each in zip(*begun)))
        if not len(answers.logps):
            return
        same = answers._replace(logps=answers.reference)
        none = torch.zeros_like(self.divergence)
        found, wanted = (
            float(unpaired_losses.compute_losses(each, z, self.preference).mean())
            for each, z in ((answers, self.divergence), (same, none))
        )
        off = float(answers.ratios.abs().sum() / answers.tokens.sum())
        preference_trainer.judge_start(self, "answers", found, wanted, off)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums = dict(zip(unpaired_losses.NAMES, ranks.add_up(self.sums.double()).tolist()))
            if sums["rows"]:
                logs |= unpaired_losses.average(list(sums.values()))
            self.sums.zero_()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        self.obey_amid_evaluation()
        inputs = self._prepare_inputs(inputs)
        batches = (inputs, self.scored), (inputs[unpaired_batches.MISMATCHED], self.held_against)
        for batch, found in batches:
            for part in self._even_passes(self._split_parts(batch)):
                with torch.no_grad(), self.compute_loss_context_manager():
                    found.append(unpaired_losses.score_answers(model, part, self.has_loss_head))
        return None, None, None  # the loss of each hangs on all of them

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.scored, self.held_against = [], []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        del output.metrics[f"{metric_key_prefix}_perplexity"]
        total, number = torch.zeros(2, device=self.args.device)
        for each in self.held_against:
            total, number = total + each.ratios.sum(), number + len(each.ratios)
        divergence = self._join_estimates(total, number)
        sums = torch.zeros(unpaired_losses.NUMBERS, device=self.args.device)
        for each in self.scored:
            losses = unpaired_losses.compute_losses(each, divergence, self.preference)
            sums += unpaired_losses.describe_answers(each, losses, divergence, self.preference)
        summed = ranks.add_up(sums.double()).tolist()
        found = {"loss": summed[0] / max(summed[2], 1)} | unpaired_losses.average(summed)
        for name, value in found.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output
