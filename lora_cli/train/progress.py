"""Watching a run: the progress line, metrics.jsonl, and the stop when loss or gradients are no
longer finite."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_cli.common import LoraError, files, ui
from lora_cli.models import attach
from lora_cli.plan import flops, hardware


class NonFiniteError(LoraError):
    """The loss or a gradient stopped being a number: nothing more is trained or saved."""


class Watch(TrainerCallback):
    """Stops a run that stops being finite, draws the progress line and writes metrics.jsonl.

    The step's loss is summed on the device and read once per optimiser step, before the optimiser
    can spread a value that is not finite into the weights.
    """

    def __init__(self, folder: Path) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.progress = ui.Progress()
        self.step_loss: torch.Tensor | float = 0.0
        self.loss = float("nan")
        self.began, self.began_step, self.began_tokens = 0.0, 0, 0
        self.stepped = False
        """Whether this process has made a step."""
        self.work = flops.Work(0.0, None)
        self.untouched: set[str] | None = None
        """Trained tensors that no step has had a gradient for; None before the first."""
        self.limit: float | None = None
        """A loss above it stops the run."""
        self.where: Callable[[], str] = str
        """The rows of the step, in words, and the last checkpoint; asked for when a step is
        refused."""
        self.loss_sum, self.lines = 0.0, 0
        """Over all steps of the run, and the lines of metrics.jsonl."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; metrics.jsonl is on the disk when it returns."""
        if self.lines:
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())
        untouched = None if self.untouched is None else sorted(self.untouched)
        return {"untouched": untouched, "loss_sum": self.loss_sum, "lines": self.lines}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; what was logged after it is forgotten."""
        self.untouched = None if state["untouched"] is None else set(state["untouched"])
        self.loss_sum, self.lines = state["loss_sum"], state["lines"]
        lines = (
            self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            if self.metrics.is_file()
            else []
        )
        files.write_text(self.metrics, "".join(lines[: self.lines]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and metrics.jsonl where the run begins."""
        self.began, self.began_step = time.monotonic(), state.global_step
        self.began_tokens = int(state.num_input_tokens_seen)
        if not state.global_step:
            files.write_text(self.metrics, "")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One read from the device: is the step's loss finite, and every gradient?"""
        gradients = {
            name: parameter.grad for name, parameter in attach.walk_trainable(kwargs["model"])
        }
        without = {name for name, gradient in gradients.items() if gradient is None}
        self.untouched = without if self.untouched is None else self.untouched & without
        norm = torch.nn.utils.get_total_norm(
            [gradient for gradient in gradients.values() if gradient is not None]
        )
        self.loss, self.step_loss = float(self.step_loss), 0.0
        self.loss_sum += self.loss
        what = None
        if not math.isfinite(self.loss):
            what = f"the loss is {self.loss}"
        elif not torch.isfinite(norm):
            what = f"a gradient is not finite (loss {self.loss:.4g})"
        elif self.limit is not None and self.loss > self.limit:
            what = f"the loss is {self.loss:.4g}, above training.stop_on_loss_above: {self.limit:g}"
        if what:
            raise NonFiniteError(
                f"stopped at step {state.global_step + 1}: {what}{self.where()}; nothing was "
                "saved from this step",
                f"--set training.learning_rate={args.learning_rate / 10:g}, or look at the data "
                "and the base's weights",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw the progress line."""
        self.stepped = True
        elapsed = time.monotonic() - self.began
        done = max(1, state.global_step - self.began_step)
        speed, used = self.speed(state), self.work.used(self.speed(state))
        left = elapsed / done * (state.max_steps - state.global_step)
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        self.progress.update(
            f"step {state.global_step}/{state.max_steps}",
            f"loss {self.loss:.4f}",
            f"lr {rate:.2e}",
            f"{speed:,.0f} tokens/s",
            *([] if used is None else [f"MFU {used:.0%}"]),
            f"{ui.format_duration(left)} left",
            force=state.global_step in (1, state.max_steps),
        )

    def speed(self, state: TrainerState) -> float:
        """Tokens per second since the clock was started."""
        tokens = int(state.num_input_tokens_seen) - self.began_tokens
        return tokens / max(time.monotonic() - self.began, 1e-9)

    def effort(self, state: TrainerState) -> dict[str, float]:
        """What metrics.jsonl and the record say of speed and memory; `mfu` only where the device's
        peak is known."""
        speed = self.speed(state)
        used = self.work.used(speed)
        found = {
            "tokens_per_second": round(speed, 1),
            "peak_memory_gb": round(hardware.measure_peak_memory() / 1e9, 3),
        }
        return found if used is None else found | {"mfu": round(used, 4)}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was to be trained and could not be: some models read a module's weight without
        calling it."""
        if self.untouched:
            self.progress.clear()
            ui.warn(
                f"{len(self.untouched)} trained tensors never had a gradient and are as they "
                "started, such as "
                f"{min(self.untouched)}; leave their modules out of lora.target_modules"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append to metrics.jsonl; an evaluation gets a line on the screen too."""
        logs = logs or {}
        if "loss" in logs:
            logs = logs | self.effort(state)
        if "train_loss" in logs:  # Trainer's is of the steps since it was resumed
            logs["train_loss"] = self.loss_sum / max(1, state.global_step)
        del state.log_history[:-1]  # it would grow with the run, in memory and in every checkpoint
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        self.lines += 1
        if "eval_loss" in logs:
            self.progress.clear()
            ui.say(
                f"step {state.global_step}: eval_loss {logs['eval_loss']:.4f}, perplexity "
                f"{logs['eval_perplexity']:.2f}"
            )
