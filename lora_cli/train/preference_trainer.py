"""transformers' Trainer for pairs of answers, of which one is preferred."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.common import LoraError, quote, ui
from lora_cli.distributed import ranks
from lora_cli.models import attach
from lora_cli.train import pair_batches, preference_losses, reference
from lora_cli.train.comparing_trainer import ComparingTrainer
from lora_cli.train.options import RunOptions
from lora_cli.train.preference_losses import NUMBERS, Pairs

NEAR, EPSILONS = 1e-3, 8
"""How far, in nats for each token on average, answers may be from their reference before the first
step: so many, or so many times the type's epsilon, which a logit of some ten is rounded by.
Measured in float32: up to 1e-6 (tiny, SmolLM2-135M)."""


class PreferenceTrainer(ComparingTrainer):
    """Trainer, watched, whose loss is the mean over a step's pairs, however these are dealt and
    cut."""

    count_examples = staticmethod(pair_batches.count_pairs)
    sums: torch.Tensor
    """What is said of the pairs since the last line in metrics.jsonl."""
    eval_sums: torch.Tensor
    begun: list[tuple[Pairs, torch.Tensor]] | None = None
    """The first pairs that are trained on, with their losses, until they are looked at."""

    def __init__(self, options: RunOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self.sums = torch.zeros(NUMBERS, device=self.args.device)
        if options.checks_start:
            self.begun = []

    def _split_parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        return pair_batches.split(inputs, super()._split_parts(inputs))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of some pairs, divided by the number of the whole step's."""
        pairs, losses = self._compare(model, inputs)
        self.sums += preference_losses.describe_pairs(pairs, losses, self.preference)
        if self.begun is not None:
            self.begun.append((pairs._replace(logps=pairs.logps.detach()), losses.detach()))
        assert num_items_in_batch is not None
        # accelerate takes the mean over the processes
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def _compare(self, model: Any, part: dict[str, Any]) -> tuple[Pairs, torch.Tensor]:
        pairs = preference_losses.score_answers(model, part, self.has_loss_head)
        return pairs, preference_losses.compute_losses(pairs, self.preference)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step:
            self.begun = None
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.begun:
            self._judge_start(self.begun)
            self.begun = None
        return loss

    def _judge_start(self, begun: list[tuple[Pairs, torch.Tensor]]) -> None:
        """Say the loss before anything is learnt; see `judge_start`."""
        pairs = Pairs(*(torch.cat(each) for each in zip(*(pairs for pairs, _ in begun))))
        if not len(pairs.logps):
            return
        assert pairs.reference is not None, "the start is checked where there is a reference"
        found = float(torch.cat([losses for _, losses in begun]).mean())
        same = pairs._replace(logps=pairs.reference)
        wanted = float(preference_losses.compute_losses(same, self.preference).mean())
        off = float(pairs.ratios.abs().sum() / pairs.tokens.sum())
        judge_start(self, "pairs", found, wanted, off)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums = ranks.add_up(self.sums.double()).tolist()
            if sums[-1]:
                logs |= preference_losses.average(sums)
            self.sums.zero_()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.obey_amid_evaluation()
        found = torch.zeros_like(self.eval_sums)
        for part in self._even_passes(self._split_parts(self._prepare_inputs(inputs))):
            with torch.no_grad(), self.compute_loss_context_manager():
                pairs, losses = self._compare(model, part)
            found += preference_losses.describe_pairs(pairs, losses, self.preference)
        self.eval_sums += found
        self.eval_loss += float(found[0])
        self.eval_tokens += int(found[-1])
        mean = found[0] / max(float(found[-1]), 1.0)
        return mean if ranks.count() == 1 else None, None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.eval_sums = torch.zeros(NUMBERS, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        del output.metrics[f"{metric_key_prefix}_perplexity"]
        found = preference_losses.average(ranks.add_up(self.eval_sums.double()).tolist())
        for name, value in found.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output


def judge_start(
    trainer: ComparingTrainer, what: str, found: float, wanted: float, off: float
) -> None:
    """Say the loss of the first pairs, or answers, and what it is where the model is the one that
    the reference was computed of. Raises LoraError where it is not: answers are `off` nats a token
    from it, and no dropout says why."""
    dtype = torch.get_autocast_dtype(trainer.args.device.type) if trainer.args.bf16 else None
    near = max(NEAR, EPSILONS * torch.finfo(dtype or trainer.model.dtype).eps)
    at_start = f"{wanted:.6f}" + (" (log 2)" if abs(wanted - math.log(2)) < 1e-6 else "")
    drops = _find_dropout(trainer.model)
    if off > near and drops is None:
        raise LoraError(
            f"the first step's loss is {found:.6f}, and {at_start} where the model is the one "
            f"that the reference was computed of: answers are {off:.2g} nats a token from it",
            f"rm -r {quote(reference.find_folder())}",
        )
    why = f", with dropout ({drops})" if drops else ""
    ui.say(f"  the first {what}' loss is {found:.6f}{why}; of the start it is {at_start}")


def _find_dropout(model: Any) -> str | None:
    """Return what drops inputs of a model in training, and so changes what it says; None where
    nothing does."""
    layers = attach.find_lora_layers(model).values()
    learnt = any(bool(each.weight.any()) for layer in layers for each in layer.lora_B.values())
    for name, module in model.named_modules():
        own = ".lora_dropout." in name
        if isinstance(module, nn.Dropout) and module.p > 0 and (learnt or not own):
            return "lora.lora_dropout" if own else f"the base's {name.rpartition('.')[2]}"
    config = model.config.get_text_config().to_dict()
    for name, value in config.items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"the base's {name}"
    return None
