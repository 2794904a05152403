"""`lora` commands inside this process, and what is seen of a training while it runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gpu_parts.clock import Clock
from gpu_parts.part import Bench, Figures
from lora_cli import cli
from lora_cli.models import attach
from lora_cli.train import run

WARM = 2
"""Steps that are not timed."""
SPREAD = 0.02
"""Of the numbers that adapters start from where two devices are compared."""


def call(*words: object, fails: bool = False) -> str:
    """Run one `lora` command here; return what it printed on stdout. RuntimeError where its status
    is not 0, unless it `fails`."""
    with redirect_stdout(io.StringIO()) as printed:
        status = cli.app([str(word) for word in words], prog_name="lora", standalone_mode=False)
    if status and not fails:
        raise RuntimeError(f"lora {words[0]} ended with status {status}")
    return printed.getvalue()


class Observer(TrainerCallback):
    """Sees a training: times of its steps, gradients, waits, a profile."""

    def __init__(
        self,
        clock: Clock,
        starts_given: bool = False,
        kept: tuple[int, ...] = (),
        waits_in: int = 0,
        profile_in: int = 0,
        stop_after: int = 0,
    ) -> None:
        self.clock, self.starts_given, self.kept = clock, starts_given, kept
        self.waits_in, self.profile_in, self.stop_after = waits_in, profile_in, stop_after
        self.gradients: dict[int, dict[str, Tensor]] = {}
        """Of some steps, by the tensors' names, in float32 on the host."""
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.tokens: list[int] = []
        """Seen when each step began, and at the end."""
        self.work: Any = None
        self.waits = Counter[str]()
        self.profile: Figures = {}
        self.open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let both of two runs that are compared start from the same numbers, with B not zero."""
        if self.starts_given:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in sorted(attach.walk_trainable(kwargs["model"])):
                    drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
                    if "lora_magnitude" not in name:
                        parameter.copy_(drawn)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time, and begin to look where that is asked for."""
        step = state.global_step + 1
        self.begun.append(time.perf_counter())
        self.tokens.append(int(state.num_input_tokens_seen))
        if step == self.waits_in:
            self.open.enter_context(self.clock.note_waits(self.waits))
        if step == self.profile_in:
            self.open.enter_context(self._profiled())

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        self.clock.finish()
        made = self.clock.make_profile()
        with made:
            began = time.perf_counter()
            yield
            self.clock.finish()
            spent = time.perf_counter() - began
        self.profile = self.clock.read_profile(made, spent)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the gradients of the steps that are asked for."""
        if state.global_step + 1 in self.kept:
            self.gradients[state.global_step + 1] = {
                name: parameter.grad.detach().float().cpu()
                for name, parameter in attach.walk_trainable(kwargs["model"])
                if parameter.grad is not None
            }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop looking, and stop the run as a person would where that is asked for."""
        self.open.close()
        self.ended.append(time.perf_counter())
        if state.global_step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the end, when the device is done."""
        self.clock.finish()
        self.begun.append(time.perf_counter())
        self.tokens.append(int(state.num_input_tokens_seen))

    def measure_speed(self) -> Figures:
        """Return tokens a second and seconds a step after the first WARM, what is spent between two
        steps, and the arithmetic's speed."""
        spent = self.begun[-1] - self.begun[WARM]
        steps = len(self.begun) - 1 - WARM
        between = [next_one - end for end, next_one in zip(self.ended, self.begun[1:])][WARM:-1]
        speed = (self.tokens[-1] - self.tokens[WARM]) / spent
        found = {"tokens_per_s": speed, "step_ms": spent / steps * 1e3}
        found["between_ms"] = sum(between) / max(1, len(between)) * 1e3
        if self.work is not None:
            found |= {"tflops": speed * self.work.each / 1e12, "mfu": self.work.used(speed)}
        return found


@contextmanager
def watched(observer: Observer) -> Iterator[None]:
    """Let the observer see every trainer that `lora train` makes inside the block."""
    own = run.setup.make_trainer

    def make(*given: Any) -> Any:
        trainer = own(*given)
        trainer.add_callback(observer)
        observer.work = trainer.options.work
        return trainer

    run.setup.make_trainer = make
    try:
        yield
    finally:
        run.setup.make_trainer = own


def write_recipe(folder: Path, model: Path, rows: Path, changes: Figures) -> Path:
    """Write a recipe that says nothing of speed, with `changes` by section; return its file."""
    recipe: Figures = {
        "method": "lora",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "lora": {"r": 16, "lora_alpha": 32},
        "data": {"path": str(rows)},
        "training": {
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values if isinstance(values, dict) else values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train(recipe: Path, observer: Observer, *words: object) -> list[Figures]:
    """Run `lora train` under an observer; return the lines of metrics.jsonl that have a loss."""
    with warnings.catch_warnings(), watched(observer):
        call("train", recipe, *words)
    return read_metrics(recipe)


def read_metrics(recipe: Path) -> list[Figures]:
    """Return the lines of a run's metrics.jsonl that have a loss."""
    lines = (recipe.parent / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def make_folder(bench: Bench, name: str) -> Path:
    """Return an empty folder for a run."""
    folder = bench.scratch / "runs" / "".join(c if c.isalnum() else "-" for c in name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
