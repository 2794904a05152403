"""TRL's and transformers' trainers, watched and resumable, with LoRA+ and evaluation by tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.common import LoraError, ui
from lora_cli.models import IGNORED, attach
from lora_cli.speed import document_attention, dora_norms, loss_head, step_packing
from lora_cli.train import checkpoints, random_state
from lora_cli.train.options import RunOptions
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Boundaries, Resumable

ROWS_SHOWN = 16


class Watched(Resumable):
    """Hands each micro-batch's loss to a `Watch`, and weighs evaluation by tokens.

    Trainer's own eval_loss is a mean of the batches' means: it changes with the batch size, and a
    row of three tokens counts as much as one of a thousand.
    """

    own_loss = False
    """Whether the model computes its loss itself, past TRL's head."""
    has_loss_head = False
    """Whether that loss is lora's own, which takes the places of the labels."""
    takes_bounds = False
    """Whether the model's attention takes the bounds of documents."""
    eval_loss = 0.0
    """Summed over the trained tokens of the evaluation so far."""
    eval_tokens = 0

    def __init__(self, options: RunOptions, **given: Any) -> None:
        super().__init__(options, **given)
        if not (options.own_loss_head and self._install_loss_head()):
            self._settle_stock_loss()
        self.takes_bounds = document_attention.takes_bounds(self.model)
        self.watch = Watch(
            Path(self.args.output_dir), options.work, options.loss_limit, self.describe_step
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(self.watch)
        self.add_callback(Boundaries(self))

    def _install_loss_head(self) -> bool:
        """Let the model compute the loss at trained tokens, and return whether it does.

        After Trainer's constructor: SFTTrainer puts a head of its own on the model there.
        """
        other = loss_head.install(self.model.get_base_model())
        if other:
            ui.say(f"  training.loss_head = stock: {other}")
            return False
        self.own_loss = self.has_loss_head = True
        if not isinstance(self.data_collator, step_packing.StepCollator):
            self.data_collator = loss_head.LabelCollator(self.data_collator)
        self.model_accepts_loss_kwargs = True
        return True

    def _settle_stock_loss(self) -> None:
        """Take the first of TRL's head, the model's own loss and that of its logits which is the
        loss of this model's next tokens."""
        stock = loss_head.try_stock(self.model.get_base_model())
        if stock.fused and not self.own_loss:
            return
        if getattr(self.args, "loss_type", "nll") not in ("nll", None):
            raise LoraError(
                f"training.loss_type: {self.args.loss_type} is computed by TRL's head, which skips "
                "a part of this model's",
                "--set training.loss_type=nll",
            )
        self.own_loss = True
        self.model_accepts_loss_kwargs = stock.own
        if not stock.own and self.label_smoother is None:
            self.compute_loss_func = loss_head.compute_from_logits

    def train(self, *args: Any, **kwargs: Any) -> Any:
        half = self.args.bf16 or self.args.fp16
        # PEFT casts inputs to the adapter's float32 and autocast casts them back: the same values,
        # for time and memory
        with attach.keep_input_types(self.model, half):
            return super().train(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        self.watch.has_scaler = self.accelerator.scaler is not None
        return self.watch.gradient_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return what a step's tokens take; Trainer's own count is that of full training."""
        return float(self.options.work.each * inputs["input_ids"].numel())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.options.loraplus:
            self.optimizer = self._create_loraplus()
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def _create_loraplus(self) -> torch.optim.Optimizer:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        return create_loraplus_optimizer(
            self.model,
            kind,
            **options,
            **self.options.loraplus,
            loraplus_weight_decay=self.args.weight_decay,
        )

    def find_step_rows(self, step: int) -> list[int] | None:
        """Places in `train_dataset` of the rows of a step, counted from 1, of this epoch; None of a
        stream.

        The epoch's order is drawn again, from the numbers it was drawn from: for a run that goes no
        further.
        """
        loader = self.callback_handler.train_dataloader
        if isinstance(loader.dataset, IterableDataset):
            return None
        passes = self.args.gradient_accumulation_steps
        done = (step - 1) % math.ceil(len(loader) / passes) * passes
        random_state.restore_state(self.epoch_rng)
        torch.empty(
            (), dtype=torch.int64
        ).random_()  # the loader's own seed, which is drawn before the order
        batches = islice(loader.batch_sampler, done, done + passes)
        return [int(place) for batch in batches for place in batch]

    def describe_step(self, step: int) -> str:
        """Such as `, on rows 3, 8 of …; checkpoint-6 is the last good one`, of a run that ends."""
        described = ""
        rows = self.find_step_rows(step)
        if rows is not None:
            kind = "packed sequences" if getattr(self.args, "packing", False) else "rows"
            more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
            listed = ", ".join(map(str, rows[:ROWS_SHOWN]))
            described = f", on {kind} {listed}{more} of the prepared data (counted from 0)"
        found = checkpoints.walk_checkpoints(Path(self.args.output_dir), self.options.run_id)
        last = next(
            (each.folder.name for each in found if isinstance(each, checkpoints.Checkpoint)), None
        )
        return f"{described}; {last} is the last good one" if last else described

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss: torch.Tensor | float = 0.0
        parts = self._split_parts(inputs)
        with dora_norms.keep_norms(self.options.dora_layers):
            for number, part in enumerate(parts, 1):
                with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    loss = loss + super().training_step(model, part, *args, **kwargs)
        assert isinstance(loss, torch.Tensor)
        self.watch.step_loss = self.watch.step_loss + loss
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if step_packing.CUTS in inputs:
            # Trainer would ask the device, in every pass, and take padding tokens out
            self.state.num_input_tokens_seen += inputs[step_packing.CUTS][-1]
        else:
            super()._track_num_input_tokens(inputs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for part in self._split_parts(inputs):
            tokens = int((part["labels"][..., 1:] != IGNORED).sum())
            loss, *others = super().prediction_step(model, part, *args, **kwargs)
            if tokens:
                self.eval_loss += float(loss) * tokens
                self.eval_tokens += tokens
        return loss, *others

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.eval_loss = 0.0
        self.eval_tokens = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self.eval_loss, self.eval_tokens], device=self.args.device)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        mean = total / tokens if tokens else float("nan")
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(mean, 700))
        return output

    def _split_parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the sequences of a step that is packed by `step`, or the batch as it is."""
        if step_packing.CUTS not in inputs:
            return [inputs]
        return step_packing.split_sequences(inputs, self.has_loss_head, self.takes_bounds)
