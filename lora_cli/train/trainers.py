"""TRL's and transformers' trainers with what lora adds: watching, resuming, LoRA+, evaluation by
tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from lora_cli.common import LoraError
from lora_cli.models import IGNORED
from lora_cli.speed import dora_norms, step_packing
from lora_cli.train import checkpoints, random_state
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Resumable

ROWS_SHOWN = 16


class _Watched:
    """Lets a Trainer hand each micro-batch's loss to its `Watch`, and weighs evaluation by tokens.

    Trainer's own eval_loss is a mean of the batches' means: it changes with the batch size, and a
    row of three tokens counts as much as one of a thousand.
    """

    watch: Watch
    eval_loss, eval_tokens = 0.0, 0
    """Summed over the evaluation so far: the loss of each trained token, and their number."""
    dora_layers: Sequence[dora_norms.FactoredDora] = ()
    """Layers whose norms are the same in all sequences of a step."""
    trained: Sequence[torch.Tensor] = ()
    """What has gradients, from the first pass on: resuming may put other tensors into the model
    before it."""
    loraplus: dict[str, float] | None = None
    """LoRA+'s arguments of PEFT's optimiser helper; None for one learning rate."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        half = self.args.bf16 or self.args.fp16  # type: ignore[attr-defined]
        # PEFT casts inputs to the adapter's float32, and autocast casts them back: the same values,
        # for time and memory
        with disable_input_dtype_casting(self.model, active=half), self._walked_once():  # type: ignore[attr-defined]
            return super().train(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _walked_once(self) -> Iterator[None]:
        """Inside, what Trainer asks of the model in every pass and step does not walk through all
        of its modules.

        A model that is training already stays as it is, and only `trained` has gradients to forget.
        Of a small model's step these walks were 4 %, of a pass of an 8-billion-parameter model
        about 10 ms.
        """
        adapted: Any = self.model  # type: ignore[attr-defined]

        def train(mode: bool = True) -> Any:
            return adapted if mode and adapted.training else type(adapted).train(adapted, mode)

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in self.trained or adapted.parameters():
                parameter.grad = None

        adapted.train()  # PEFT's own module says that it trains, the base's within it that they do not
        adapted.train, adapted.zero_grad, self.trained = train, zero_grad, ()
        try:
            yield
        finally:
            del adapted.train, adapted.zero_grad

    def _clip_grad_norm(self, model: Any) -> Any:
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        if spread or self._has_mixed_mesh_grads(model):  # type: ignore[attr-defined]
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)  # type: ignore[attr-defined]

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """What a step's tokens take, of which Trainer's own count is that of full training."""
        return self.watch.work.each * inputs["input_ids"].numel()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        try:
            return self._optimizer(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            raise LoraError(f"training.optim: {said}", "--set training.optim=auto") from error

    def _optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.loraplus is None:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
        self.optimizer = create_loraplus_optimizer(
            self.model,  # type: ignore[attr-defined]
            kind,
            **options,
            **self.loraplus,
            loraplus_weight_decay=self.args.weight_decay,  # type: ignore[attr-defined]
        )
        return self.optimizer

    def step_rows(self) -> list[int] | None:
        """Places in `train_dataset` of the rows of the step that is being made; None of a stream.

        The epoch's order is drawn again, from the numbers it was drawn from: for a run that goes no
        further.
        """
        loader = self.callback_handler.train_dataloader  # type: ignore[attr-defined]
        if isinstance(loader.dataset, IterableDataset):
            return None
        passes = self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        done = self.state.global_step % math.ceil(len(loader) / passes) * passes  # type: ignore[attr-defined]
        random_state.restore_state(self.epoch_rng)  # type: ignore[attr-defined]
        torch.empty(
            (), dtype=torch.int64
        ).random_()  # the loader's own seed, which is drawn before the order
        return [
            int(place)
            for batch in islice(loader.batch_sampler, done, done + passes)
            for place in batch
        ]

    def step_in_words(self) -> str:
        """`, on rows 3, 17 and 20 of …; checkpoint-6 is the last good one`."""
        rows, said, folder = self.step_rows(), "", Path(self.args.output_dir)  # type: ignore[attr-defined]
        if rows is not None:
            kind = "packed sequences" if getattr(self.args, "packing", False) else "rows"  # type: ignore[attr-defined]
            more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
            said = f", on {kind} {', '.join(map(str, rows[:ROWS_SHOWN]))}{more} of the prepared data (counted from 0)"
        found = checkpoints.walk_checkpoints(folder, self.run_id)  # type: ignore[attr-defined]
        last = next(
            (each.folder.name for each in found if isinstance(each, checkpoints.Checkpoint)), None
        )
        return f"{said}; {last} is the last good one" if last else said

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss: torch.Tensor | float = 0.0
        self.trained = self.trained or [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        parts = step_packing.split_sequences(inputs) if step_packing.CUTS in inputs else [inputs]
        with dora_norms.keep_norms(self.dora_layers):
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                with nullcontext() if last else self.accelerator.no_sync(model):  # type: ignore[attr-defined]
                    loss = loss + super().training_step(model, part, *args, **kwargs)  # type: ignore[misc]
        assert isinstance(loss, torch.Tensor)
        self.watch.step_loss = self.watch.step_loss + loss
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if (
            step_packing.CUTS in inputs
        ):  # known here: Trainer asks the device, in every pass, and takes padding tokens out
            self.state.num_input_tokens_seen += inputs[step_packing.CUTS][-1]  # type: ignore[attr-defined]
        else:
            super()._track_num_input_tokens(inputs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for part in (
            step_packing.split_sequences(inputs) if step_packing.CUTS in inputs else [inputs]
        ):
            tokens = int((part["labels"][..., 1:] != IGNORED).sum())
            loss, *others = super().prediction_step(model, part, *args, **kwargs)  # type: ignore[misc]
            if tokens:
                self.eval_loss, self.eval_tokens = (
                    self.eval_loss + float(loss) * tokens,
                    self.eval_tokens + tokens,
                )
        return loss, *others

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.eval_loss, self.eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        sums = torch.tensor([self.eval_loss, self.eval_tokens], device=self.args.device)  # type: ignore[attr-defined]
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()  # type: ignore[attr-defined]
        mean = total / tokens if tokens else float("nan")
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(mean, 700))
        return output


class WatchedSFTTrainer(_Watched, Resumable, SFTTrainer):
    """TRL's SFTTrainer, watched; with `own_loss` the model computes its loss itself (`loss.py`),
    and not TRL's head."""

    own_loss = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self.own_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)


class WatchedTrainer(_Watched, Resumable, Trainer):
    """transformers' Trainer, watched; the model computes its loss itself in any case."""

    own_loss = True
