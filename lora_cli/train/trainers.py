"""TRL's and transformers' trainers, watched and resumable, with LoRA+ and evaluation by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from lora_cli.common import LoraError, ui
from lora_cli.distributed import ranks
from lora_cli.models import IGNORED, attach
from lora_cli.speed import document_attention, dora_norms, loss_head, step_packing
from lora_cli.train import checkpoints, dealing, random_state, trackers
from lora_cli.train.options import RunOptions
from lora_cli.train.picture import Picture
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Boundaries, Resumable

ROWS_SHOWN = 16
BALANCE = "router_aux_loss_coef"
"""Where transformers' models, TRL's trainer and, for models with a tower for pictures, the
configuration have the factor of that loss."""


def _count_tokens(inputs: dict[str, Any]) -> torch.Tensor | int:
    """Return how many tokens a batch has beside its padding, without waiting for its device."""
    if step_packing.CUTS in inputs:
        return int(inputs[step_packing.CUTS][-1])
    if "input_ids" not in inputs:
        return len(inputs["labels"])  # pictures
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else mask.sum()


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
    _loads_steps = False
    """Whether the loader that is made is that of the training."""
    eval_loss = 0.0
    """Summed over the trained tokens of the evaluation so far."""
    eval_tokens = 0

    def __init__(self, options: RunOptions, **given: Any) -> None:
        super().__init__(options, **given)
        if not (options.own_loss_head and self._install_loss_head()):
            self._settle_stock_loss()
        self.takes_bounds = document_attention.takes_bounds(self.model)
        if (
            ranks.count() > 1
        ):  # accelerate would give each process other batches, and some rows twice
            self.accelerator.prepare_data_loader = self._deal_loader
        self.watch = Watch(
            Path(self.args.output_dir),
            options.work,
            options.loss_limit,
            self.describe_step,
            self._make_picture(),
            options.samples,
        )
        self.remove_callback(PrinterCallback)
        folder = Path(self.args.output_dir)
        self.callback_handler.callbacks = [
            trackers.guard(each, options.recipe, folder, self.watch.list_receipt)
            for each in self.callback_handler.callbacks
        ]
        self.add_callback(self.watch)
        if self.options.patience is not None:
            self.add_callback(self.stopping)
        self.add_callback(Boundaries(self))

    def _make_picture(self) -> Picture:
        """Return the picture of a run that has not begun."""
        return Picture(
            self.options.subject,
            self.options.work.unit,
            self.options.planned,
            self.name_best_metric(),
            bool(self.args.greater_is_better),
        )

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
            # over the labels of a step, also where the model says that its own loss is not
            self.model_accepts_loss_kwargs = True
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
            ended = super().train(*args, **kwargs)
            if self.args.eval_strategy == "no":
                self.sample()
            return ended

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log for trackers, too, what metrics.jsonl has: they are told before it is written."""
        self.watch.complete(logs, self.state)
        super().log(logs, start_time)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        self.watch.has_scaler = self.accelerator.scaler is not None
        return self.watch.gradient_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return what a step's tokens take; Trainer's own count is that of full training."""
        units = inputs["input_ids"].numel() if "input_ids" in inputs else len(inputs["labels"])
        return float(self.options.work.each * units)

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
        parts = self._even_passes(self._split_parts(inputs))
        with dora_norms.keep_norms(self.options.dora_layers), self._balanced(len(parts)):
            for number, part in enumerate(parts, 1):
                with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    loss = loss + super().training_step(model, part, *args, **kwargs)
        assert isinstance(loss, torch.Tensor)
        self.watch.step_loss = self.watch.step_loss + loss
        return loss

    @contextmanager
    def _balanced(self, parts: int) -> Iterator[None]:
        """Let the loss by which a mixture of experts balances them, of which each pass adds a
        whole one, count once in a step however many passes that has."""
        # TRL divides its own by the batches of a step
        passes = parts * (self.current_gradient_accumulation_steps if self.own_loss else 1)
        network = self.model.get_base_model()
        places = (self, network, network.config.get_text_config())
        owners = [each for each in places if hasattr(each, BALANCE)]
        before = [getattr(each, BALANCE) for each in owners]
        for each, coefficient in zip(owners, before):
            setattr(each, BALANCE, coefficient / passes)
        try:
            yield
        finally:
            for each, coefficient in zip(owners, before):
                setattr(each, BALANCE, coefficient)

    def get_train_dataloader(self) -> Any:
        self._loads_steps = True
        try:
            return super().get_train_dataloader()
        finally:
            self._loads_steps = False

    def _deal_loader(self, loader: DataLoader[Any], **_: Any) -> DataLoader[Any]:
        """Stand for accelerate's method, which gives its own options as well."""
        batches = self.options.batches if self._loads_steps else None
        return dealing.deal_loader(self.args, self.accelerator.device, loader, batches)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        drawn = super()._get_train_sampler(*args, **kwargs)
        return dealing.settle_sampler(drawn, self.args.seed, self.options.batches)

    def _even_passes(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the sequences of a step, with empty ones before them where another process has
        more and all take part in each pass: sharded weights are gathered, TRL's loss asks all."""
        if ranks.count() == 1 or (self.own_loss and not self.options.sharded):
            return parts
        most = ranks.find_largest([len(parts)])[0]
        empty = [
            self._split_parts(self._prepare_inputs(self.data_collator([dealing.EMPTY])))[0]
            for _ in range(most - len(parts))
        ]
        return [*empty, *parts]

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Trainer would ask the device and the other processes, in every pass, and take padding
        # tokens out
        packed = step_packing.CUTS in inputs
        if ranks.count() > 1:
            self.watch.step_tokens = self.watch.step_tokens + _count_tokens(inputs)
        elif packed:
            self.state.num_input_tokens_seen += inputs[step_packing.CUTS][-1]
        elif "input_ids" not in inputs:
            self.state.num_input_tokens_seen += _count_tokens(inputs)
        else:
            super()._track_num_input_tokens(inputs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.obey_amid_evaluation()
        for part in self._even_passes(self._split_parts(inputs)):
            tokens = int((part["labels"][..., 1:] != IGNORED).sum())
            loss, *others = super().prediction_step(model, part, *args, **kwargs)
            if tokens:
                self.eval_loss += float(loss) * tokens
                self.eval_tokens += tokens
        # Trainer would gather one for each row, of which others have more or less
        return loss if ranks.count() == 1 else None, *others

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.eval_loss = 0.0
        self.eval_tokens = 0
        # a pass's loss is that of this process's own rows
        averaged, self.args.average_tokens_across_devices = (
            self.args.average_tokens_across_devices,
            ranks.count() == 1,
        )
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = averaged
        sums = torch.tensor([self.eval_loss, self.eval_tokens], dtype=torch.float64)
        total, tokens = ranks.add_up(sums).tolist()
        mean = total / tokens if tokens else float("nan")
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(mean, 700))
        return output

    def _split_parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the sequences of a step that is packed by `step`, or the batch as it is."""
        if step_packing.CUTS not in inputs:
            return [inputs]
        return step_packing.split_sequences(inputs, self.has_loss_head, self.takes_bounds)
