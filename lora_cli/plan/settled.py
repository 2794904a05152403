"""Settle a recipe: find its base and the adapter it trains on, and replace every `auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import provenance
from lora_cli.models import Base, Parent, TrainingRecord, take_over
from lora_cli.plan import auto, auto_choices, configurations, hardware, task_settings
from lora_cli.plan.hardware import Hardware
from lora_cli.recipe import Distributed, Recipe
from lora_cli.speed import step_packing


class Settled(NamedTuple):
    """A recipe ready to be trained, and what it was settled by."""

    recipe: Recipe
    base: Base
    parent: Parent | None
    """The adapter that it trains on."""
    device: Hardware
    choices: list[auto_choices.Choice]

    def list_lines(self) -> list[str]:
        """Say what was found and chosen, a line each."""
        found = []
        if self.parent is not None:
            found = [f"trains on: {self.parent.describe()}", *self.parent.notes]
        if self.recipe.distributed.strategy == "deepspeed-zero2":
            found.append(
                "distributed.strategy: deepspeed-zero2 is ddp here: only an adapter has gradients "
                "and optimiser state to divide"
            )
        return [*found, *map(str, self.choices)]


NEWER: dict[str, Any] = {"early_stopping_threshold": 0.0, "sample_prompts": [], "sample_tokens": 64}
"""Keys of `training` that earlier versions had not, and what they did."""


def read_recorded(run: Path) -> dict[str, Any]:
    """Return the resolved recipe of the run in a folder, with what a key meant that it was begun
    before."""
    recipe = TrainingRecord.read(run / provenance.RUN_RECORD).recipe
    recorded = recipe.to_data()
    recorded.setdefault("distributed", Distributed().collect_values())
    recorded.setdefault("objective", "auto")
    training = recorded.get("training", {})
    if training.get("packing") == "step" and "packed_length" not in training:
        longest = recipe.training.max_length or step_packing.SEQUENCE
        training["packed_length"] = min(longest, step_packing.SEQUENCE)
    if training:
        best = training.pop("load_best_model_at_end", False)  # its name before
        recorded["training"] = {"keep": "best" if best else "last"} | NEWER | training
    return recorded


def settle_recipe(
    recipe: Recipe,
    device: Hardware | None = None,
    run: Path | None = None,
    processes: int = 1,
) -> Settled:
    """Settle a recipe for a device, by default this machine's, and for `processes` that train
    together; LoraError for what no run could do.

    `run` is the folder of a run that is resumed.
    """
    asked_base = recipe.model.name_or_path
    recipe, parent = take_over(recipe, run)
    if run is not None and (run / provenance.RUN_RECORD).is_file():
        file = run / provenance.RUN_RECORD
        recipe = auto.take_recorded(recipe, read_recorded(run), file)
    configurations.try_configurations(recipe, device)
    recipe, of_task = task_settings.settle_labels(recipe)
    base = Base.of_recipe(recipe)
    recipe = task_settings.settle_head(recipe, base, of_task)
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    recipe, choices = auto.settle(recipe, base.config, device, processes)
    choices[:0] = of_task
    if parent is not None:
        parent.refuse_other_base(base)
        if asked_base == "auto":
            reason = f"the base that {parent} names"
            choices.insert(0, auto_choices.Choice("model.name_or_path", base.name, reason))
    return Settled(recipe, base, parent, device, choices)
