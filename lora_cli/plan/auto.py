"""What each `auto` of a recipe becomes on a device: chosen, or taken from the run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter
from transformers import PretrainedConfig

from lora_cli.common import stored
from lora_cli.models import quantised
from lora_cli.plan import hardware
from lora_cli.plan.auto_choices import CHOOSERS, Choice, Chosen, Situation
from lora_cli.plan.hardware import Hardware
from lora_cli.plan.outlook import (
    choose_optimizer,
    choose_packed_length,
    choose_strategy,
    foresee_memory,
)
from lora_cli.recipe import Recipe

DECIDED_LAST = ("training.optim", "training.gradient_checkpointing", "training.packed_length")
"""What the memory plan has to say to, after CHOOSERS."""
OF_THE_DATA = ("model.labels", "model.problem_type")
"""What `task_settings.py` finds before all else."""


def settle(
    recipe: Recipe,
    config: PretrainedConfig | None = None,
    device: Hardware | None = None,
    processes: int = 1,
) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with every `auto` replaced, and the choices made.

    `config` is the base's. Without it a checkpoint in float32 is assumed, and what the memory plan
    has to say to is chosen by the kind of device alone. `device` is what the recipe is to run on,
    by default this machine's. How to share the work stays open where one process trains alone.
    """
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    choices: list[Choice] = []
    recipe = _adopt_storage(recipe, config, choices)
    for key, choose in CHOOSERS.items():
        if _read_key(recipe, key) == "auto":
            recipe = _make_choice(recipe, key, choose(Situation(recipe, device, config)), choices)
    given = Situation(recipe, device, config, processes)
    outlook = foresee_memory(given)
    decided = {
        "training.optim": choose_optimizer(device, outlook),
        "training.gradient_checkpointing": (outlook.checkpointing, outlook.reason),
    }
    if given.lets_shard:
        decided["distributed.strategy"] = choose_strategy(given, outlook)
    for key, chosen in decided.items():
        if _read_key(recipe, key) == "auto":
            recipe = _make_choice(recipe, key, chosen, choices)
    if recipe.training.packed_length == "auto":
        chosen = choose_packed_length(Situation(recipe, device, config))
        recipe = _make_choice(recipe, "training.packed_length", chosen, choices)
    return recipe, choices


def _adopt_storage(
    recipe: Recipe, config: PretrainedConfig | None, choices: list[Choice]
) -> Recipe:
    """Return the recipe with the 4-bit storage of a base that is quantised already, and add what
    that changes to `choices`."""
    found = quantised.find_quantised(config) if config and recipe.quantized else None
    if found is None or not found.in_4bit:
        return recipe
    stored = found.read_stored()
    for key, value in stored.items():
        if getattr(recipe.quantization, key) != value:
            choices.append(Choice(f"quantization.{key}", value, "the base is quantised so already"))
    return recipe.replace(recipe.trainer, {"quantization": stored})


def take_recorded(recipe: Recipe, recorded: dict[str, Any], file: Path) -> Recipe:
    """Return the recipe of a run that goes on: what it leaves open is what the run began with.

    What `auto` becomes may hang on what is free of a GPU's memory when it is asked. Raises
    DamagedError for a value in the run's record, `file`, that the key cannot have.
    """
    for key in (*CHOOSERS, *DECIDED_LAST, *OF_THE_DATA):
        section, _, name = key.rpartition(".")
        values = (recorded.get(section) or {}) if section else recorded
        if name in values and _read_key(recipe, key) == "auto":
            with stored.explain_misfits(file, "recipe", key):
                recipe = _set_key(recipe, key, _check_value(recipe, key, values[name]))
    return recipe


def _check_value(recipe: Recipe, key: str, value: Any) -> Any:
    section, _, name = key.rpartition(".")
    field = type(getattr(recipe, section) if section else recipe).model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)


def _read_key(recipe: Recipe, key: str) -> Any:
    """Return the value of `trainer` or `section.name`; None for 4-bit storage without a 4-bit
    method."""
    section, _, name = key.rpartition(".")
    if section == "quantization" and not recipe.quantized:
        return None
    return getattr(getattr(recipe, section) if section else recipe, name)


def _make_choice(recipe: Recipe, key: str, chosen: Chosen, choices: list[Choice]) -> Recipe:
    """Return the recipe with a value chosen for `key`, which is added to `choices`.

    None leaves the key open: it is transformers' choice, and recorded when the model is loaded.
    """
    value, reason = chosen
    if value is not None:
        choices.append(Choice(key, value, reason))
    return _set_key(recipe, key, value)


def _set_key(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, _, name = key.rpartition(".")
    if not section:
        return recipe.replace(value, {})
    return recipe.replace(recipe.trainer, {section: {name: value}})
