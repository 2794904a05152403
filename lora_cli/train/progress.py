"""Watch a run: show where it is, write what is logged, stop at a step that is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_cli.common import spell_count, ui
from lora_cli.distributed import ranks
from lora_cli.models import attach
from lora_cli.plan import flops, hardware
from lora_cli.recipe import PREFERENCE_METRICS, TASKS
from lora_cli.train.metrics_file import Metrics
from lora_cli.train.picture import Line, Picture
from lora_cli.train.samples import Asked, Samples
from lora_cli.train.saved_state import WatchState
from lora_cli.train.step_numbers import NonFiniteError, StepNumbers, find_leaving_out

SKIPPED = 20
"""Steps in a row that a loss scaler may skip: it starts at 2^16 and halves, so that from 2^-4 on it
is not the scale that overflows."""
SHOWN = {
    "loss": ".4f",
    "perplexity": ".2f",
    **dict.fromkeys((name for task in TASKS for name in task.shown), ".3f"),
    **dict.fromkeys(PREFERENCE_METRICS[:2], ".3f"),
    "kl": ".3f",
}
"""The metrics that the screen shows of an evaluation, and how."""


def describe_evaluation(logs: Mapping[str, float]) -> str:
    """Return such as `eval_loss 0.4321, accuracy 0.870`."""
    found = {name.removeprefix("eval_"): value for name, value in logs.items()}
    said = [f"{name} {value:{SHOWN[name]}}" for name, value in found.items() if name in SHOWN]
    return f"eval_{', '.join(said)}"


class Watch(TrainerCallback):
    """Stops a run that is not finite, shows where it is and writes metrics.jsonl.

    The step's loss is summed on the device and read once per optimiser step, before the optimiser
    can spread a value that is not finite into the weights. A GPU would stand idle meanwhile: where
    its optimiser leaves such a step out by itself, the numbers are read in the next step, or before
    this one is logged, saved or the last.
    """

    has_scaler = False
    """Whether losses are scaled for float16: a step whose gradients overflow is then skipped by the
    scaler, which starts high and looks for the largest scale in that way."""
    skipped = 0
    """Steps in a row that were."""
    overflowed = 0
    """Steps of this process that were."""
    began = 0.0
    began_step = 0
    began_tokens = 0
    stepped = False
    """Whether this process has completed a step."""
    had_rate = False
    """Whether one of them had a learning rate above 0."""
    evaluated = 0
    """Batches of the evaluation that is being made."""

    def __init__(
        self,
        folder: Path,
        work: flops.Work,
        limit: float | None,
        where: Callable[[int], str],
        picture: Picture | None = None,
        asked: Asked = Asked(),
    ) -> None:
        self.metrics = Metrics(folder)
        self.progress = ui.Progress()
        self.screen = ui.Screen()
        self.picture = picture or Picture()
        """What the screen shows of the run."""
        self.samples = Samples(folder, asked)
        self.step_loss: torch.Tensor | float = 0.0
        self.step_tokens: torch.Tensor | int = 0
        self.state: TrainerState | None = None
        self.loss = float("nan")
        self.gradient_norm: torch.Tensor | float = 0.0
        """Of the step's gradients before they are clipped."""
        self.work = work
        self.untouched: set[str] | None = None
        """Trained tensors that have never had a gradient; None before the first step."""
        self.limit = limit
        """A loss above it stops the run."""
        self.where = where
        """Describes the rows of a step and the last checkpoint; called when that is refused."""
        self.unread: StepNumbers | None = None
        """What is still to be looked at."""
        self.loss_sum = 0.0
        """The losses of all steps of the run."""

    def capture_state(self) -> WatchState:
        """Return what a checkpoint keeps; brings what is written to the disk first."""
        self.read_step()
        untouched = None if self.untouched is None else sorted(self.untouched)
        return WatchState(
            untouched=untouched,
            loss_sum=self.loss_sum,
            lines=self.metrics.flush(),
            samples=self.samples.flush(),
        )

    def restore_state(self, state: WatchState) -> None:
        """Go on from `state`, and drop the lines that were logged after it."""
        self.untouched = None if state.untouched is None else set(state.untouched)
        self.loss_sum = state.loss_sum
        if not ranks.is_first():
            return
        self.picture.recall(self.metrics.cut(state.lines))
        self.samples.cut(state.samples)
        self.picture.sample = self.samples.show()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and at the run's beginning metrics.jsonl."""
        self.began = time.monotonic()
        self.began_step = state.global_step
        self.began_tokens = int(state.num_input_tokens_seen)
        self.state = state
        if not ranks.is_first():
            return
        if not state.global_step:
            self.metrics.begin()
        self.picture.step, self.picture.steps = state.global_step, state.max_steps
        self.show_doing("", force=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop if the step's loss or a gradient is not finite, or the loss above its limit."""
        self.read_step()
        if not self.had_rate:
            self.had_rate = any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)
        if self.untouched is None or self.untouched:
            parameters = attach.walk_trainable(kwargs["model"])
            without = {name for name, parameter in parameters if parameter.grad is None}
            self.untouched = without if self.untouched is None else self.untouched & without
        lower = f"--set training.learning_rate={args.learning_rate / 10:g}"
        if args.fp16:
            lower = f"--set model.dtype=float32, since some models overflow float16; {lower}"
        numbers = self.step_loss, self.gradient_norm, self.step_tokens
        step = StepNumbers(state.global_step + 1, *numbers, lower).sum_up()
        self.step_loss, self.step_tokens = 0.0, 0
        optimizer = None if self.has_scaler else find_leaving_out(kwargs.get("optimizer"))
        if optimizer is None:
            self.unread = step
            self.read_step()
        else:
            optimizer.found_inf, self.unread = step.judge(self.limit), step.copy_to_host()

    def read_step(self) -> None:
        """Look at the numbers of the last step, if that was not done; NonFiniteError for what stops
        a run."""
        if self.unread is None:
            return
        number, loss, norm, tokens, lower = self.unread.read()
        self.unread = None
        if tokens and self.state:
            self.state.num_input_tokens_seen += tokens
        self.loss = loss
        self.loss_sum += loss
        self.picture.losses.add(loss)
        self.picture.norm = norm
        reason = None
        overflows = not math.isfinite(norm)
        self.skipped = self.skipped + 1 if overflows else 0
        self.overflowed += overflows
        if not math.isfinite(self.loss):
            reason = f"the loss is {self.loss}"
        elif overflows and (not self.has_scaler or self.skipped > SKIPPED):
            reason = f"a gradient is not finite (loss {self.loss:.4g})"
        elif self.limit is not None and self.loss > self.limit:
            reason = (
                f"the loss is {self.loss:.4g}, above training.stop_on_loss_above: {self.limit:g}"
            )
        if reason:
            where = self.where(number)
            raise NonFiniteError(
                f"stopped at step {number}: {reason}{where}; nothing was saved from this step",
                f"{lower}, or look at the data and the base's weights",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show where the run is."""
        shown = state.global_step in (1, state.max_steps)
        due = control.should_log or control.should_save or control.should_evaluate
        if shown or due or control.should_training_stop or control.should_epoch_stop:
            self.read_step()
        self.stepped = True
        if not ranks.is_first() or not (shown or self.screen.is_due()):
            return
        self._look(state, kwargs["lr_scheduler"].get_last_lr()[0])
        if not self.screen.show(self._draw):
            used = self.picture.used
            self.progress.update(
                f"step {state.global_step}/{state.max_steps}",
                f"loss {self.loss:.4f}",
                f"lr {self.picture.rate:.2e}",
                f"{self.picture.speed:,.0f} {self.work.unit}/s",
                *([] if used is None else [f"MFU {used:.0%}"]),
                f"{ui.format_duration(self.picture.left or 0)} left",
                force=shown,
            )

    def _look(self, state: TrainerState, rate: float) -> None:
        """Note what is shown of the step that has ended."""
        picture = self.picture
        elapsed = time.monotonic() - self.began
        done = max(1, state.global_step - self.began_step)
        picture.step, picture.steps, picture.doing = state.global_step, state.max_steps, ""
        picture.left = elapsed / done * (state.max_steps - state.global_step)
        picture.loss, picture.rate = self.loss, rate
        picture.speed = self.measure_speed(state)
        picture.used = self.work.used(picture.speed)

    def _draw(self, columns: int, rows: int) -> list[Line]:
        self.picture.memory = hardware.measure_memory()
        self.picture.peak = hardware.measure_peak_memory()
        return self.picture.draw(columns, rows)

    def show_doing(self, what: str, force: bool = False) -> None:
        """Show in the picture what goes on between two steps; elsewhere nothing."""
        self.picture.doing = what
        if ranks.is_first() and (force or self.screen.is_due()):
            self.screen.show(self._draw)

    def show_samples(self, answers: Sequence[str]) -> None:
        """Write the answers of this step, and show the first one."""
        assert self.state is not None
        self.samples.add(self.state.global_step, answers)
        self.picture.sample = self.samples.show()
        self.show_doing("", force=True)

    def clear(self) -> None:
        """Remove what is drawn, to make room for prose."""
        self.progress.clear()
        self.screen.close()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far an evaluation is."""
        self.evaluated += 1
        self.show_doing(f"evaluating {self.evaluated}/{len(kwargs['eval_dataloader'])}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The evaluation has ended."""
        self.evaluated = 0
        self.picture.doing = ""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The order of this epoch's rows is known until now, if a step is to be described."""
        self.read_step()

    def measure_speed(self, state: TrainerState) -> float:
        """Tokens per second since the clock was started."""
        tokens = int(state.num_input_tokens_seen) - self.began_tokens
        return tokens / max(time.monotonic() - self.began, 1e-9)

    def measure_effort(self, state: TrainerState) -> dict[str, float]:
        """Speed and memory for metrics.jsonl and the record; `mfu` only where the peak is known."""
        speed = self.measure_speed(state)
        found = {
            f"{self.work.unit}_per_second": round(speed, 1),
            "peak_memory_gb": round(hardware.measure_peak_memory() / 1e9, 3),
        }
        used = self.work.used(speed)
        return found if used is None else found | {"mfu": round(used, 4)}

    def complete(self, logs: dict[str, float], state: TrainerState) -> None:
        """Put into what Trainer logs what it does not know: speed and memory, and the mean loss of
        all steps, since its own is of those since the run was resumed."""
        if "loss" in logs:
            logs.update(self.measure_effort(state))
        if "train_loss" in logs:
            logs["train_loss"] = self.loss_sum / max(1, state.global_step)

    def list_receipt(self, state: TrainerState) -> dict[str, float]:
        """Return the numbers of the receipt that no line of the log has for the whole run."""
        found = {self.work.unit: int(state.num_input_tokens_seen), **self.measure_effort(state)}
        planned = self.picture.planned
        return found if planned is None else found | {"planned_memory_gb": round(planned / 1e9, 3)}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of tensors without gradient: models may read a weight without calling its module;
        and of steps that a loss scaler skipped. NonFiniteError where it skipped all of them."""
        self.read_step()
        steps = state.global_step - self.began_step
        if self.has_scaler and 0 < self.overflowed == steps:
            raise NonFiniteError(
                f"each of the {steps} steps overflowed float16 and was skipped: nothing is trained",
                "--set model.dtype=float32, or more steps",
            )
        if self.has_scaler and self.overflowed:
            self.progress.clear()
            ui.warn(
                f"{self.overflowed} of {spell_count(steps, 'step')} overflowed float16, and were "
                "skipped"
            )
        if self.untouched:
            self.progress.clear()
            number, first = len(self.untouched), min(self.untouched)
            ui.warn(
                f"{number} trained tensors never had a gradient and are as they started, such as "
                f"{first}; leave their modules out of lora.target_modules"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append to metrics.jsonl, and show an evaluation on the screen too."""
        logs = logs or {}
        del state.log_history[:-1]  # it grows with the run, in memory and in every checkpoint
        if not ranks.is_first():
            return
        self.metrics.add(state.global_step, logs)
        if "eval_loss" in logs:
            self.picture.add_evaluation(state.global_step, logs)
            self.progress.clear()
            ui.say(f"step {state.global_step}: {describe_evaluation(logs)}")
