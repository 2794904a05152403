"""Train a recipe's first two steps, to learn how long its steps take: nothing is kept."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_cli.common import files, translate_refusals, ui
from lora_cli.data import prepare
from lora_cli.plan import settled, sizes
from lora_cli.recipe import Recipe
from lora_cli.train import run, run_folder, setup
from lora_cli.train.inputs import Inputs, add_references, prepare_inputs

WITHOUT: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "keep": "last",
    "early_stopping_patience": None,
    "sample_prompts": [],
    "report_to": "none",
}
"""What is left out: evaluations, checkpoints, other programs."""


UNREAD: dict[str, Any] = {"config": {}, "tensors": {}}
"""A base's fingerprint, which nobody asks for: its weights need not be read for it."""


class Measured(NamedTuple):
    """How long a recipe's steps take on this machine."""

    seconds: float
    """Of one step: the second, as the first one also warms up; the first where there is one."""
    units: int
    """Tokens, or pictures, of that step."""
    evaluation_seconds: float
    """Of evaluating once, by one batch; 0 where nothing is held out."""
    reference_seconds: float
    """Of what pairs of answers are held against, before the first step; 0 without such."""
    steps: sizes.Steps
    train_rows: prepare.Prepared
    eval_rows: prepare.Prepared | None

    def estimate_seconds(self, steps: int) -> float:
        """Return how long so many steps take, by the number of their tokens, with an evaluation in
        each pass over the rows."""
        mean = self.train_rows.counts.tokens / self.steps.steps_per_epoch
        each = self.seconds * mean / max(self.units, 1)
        passes = math.ceil(steps / self.steps.steps_per_epoch)
        return self.reference_seconds + steps * each + passes * self.evaluation_seconds


class _Clock(TrainerCallback):
    """Times the first steps, and ends the training after them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.units: list[int] = []

    def _look(self, state: TrainerState) -> tuple[float, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), int(state.num_input_tokens_seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = self._look(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now, seen = self._look(state)
        self.seconds.append(now - self.began[0])
        self.units.append(seen - self.began[1])
        control.should_training_stop = len(self.seconds) == 2


def measure_steps(recipe: Recipe) -> Measured:
    """Return how long the steps of a recipe take: its own base, rows and trainer make two.

    Raises LoraError for what the run itself would refuse before them.
    """
    recipe = recipe.replace(recipe.trainer, {"training": WITHOUT})
    with files.scratch_folder() as folder, ui.hush():
        recipe = recipe.model_copy(update={"output_dir": str(folder / "run")})
        Path(recipe.output_dir).mkdir()
        found = settled.settle_recipe(recipe)
        contents = {
            "choices": [choice._asdict() for choice in found.choices],
            "base": {"name": found.base.name, "commit": found.base.revision, "fingerprint": UNREAD},
        }
        drafted = run_folder.draft_run(
            Path(recipe.output_dir), found.recipe.to_data(), contents, resume=False
        )
        with translate_refusals(found.recipe.list_passed_on()):
            inputs = prepare_inputs(found.recipe, found.base, found.parent, drafted)
            settled_recipe, adapted = run.load_adapted(found.recipe, found.base, drafted, inputs)
            few = _take_few(inputs, settled_recipe)
            began = time.perf_counter()
            few = add_references(settled_recipe, found.base, adapted, few)
            reference = time.perf_counter() - began
            trainer = setup.make_trainer(settled_recipe, adapted, few, drafted)
            clock = _Clock(adapted.device)
            trainer.add_callback(clock)
            trainer.train()
            evaluation = _time_evaluation(trainer, few.eval_rows)
        steps = sizes.count_steps(found.recipe, inputs.train_rows)
    more = _count_rows(inputs) / _count_rows(few) if found.recipe.objective_row.compares else 0
    evaluated = len(inputs.eval_rows.rows) if inputs.eval_rows else 0
    times = clock.seconds[-1], clock.units[-1], evaluation * evaluated, reference * more
    return Measured(*times, steps, inputs.train_rows, inputs.eval_rows)


def _take_few(inputs: Inputs, recipe: Recipe) -> Inputs:
    """Return the inputs with rows for one batch of an evaluation; and, of pairs of answers, for two
    steps, as all are looked at before the first."""
    train, evaluation = inputs.train_rows, inputs.eval_rows
    if recipe.objective_row.compares:
        train = _cut(train, 2 * recipe.count_step_rows())
    if evaluation is not None:
        evaluation = _cut(evaluation, recipe.training.per_device_train_batch_size)
    return inputs._replace(train_rows=train, eval_rows=evaluation)


def _cut(rows: prepare.Prepared, most: int) -> prepare.Prepared:
    return rows._replace(rows=rows.rows.select(range(min(most, len(rows.rows)))))


def _count_rows(inputs: Inputs) -> int:
    return sum(len(each.rows) for each in (inputs.train_rows, inputs.eval_rows) if each)


def _time_evaluation(trainer: Any, rows: prepare.Prepared | None) -> float:
    """Return the seconds that a row takes to be evaluated."""
    if rows is None:
        return 0.0
    began = time.perf_counter()
    trainer.evaluate()
    return (time.perf_counter() - began) / len(rows.rows)
