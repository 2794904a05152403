"""The tables of what a model is trained to do and by what: a row per task and per objective.

Everyone asks `recipe.task` and `recipe.objective`; nobody else knows their names. Nothing heavy is
imported here: classes of other libraries are named, and imported when they are needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from lora_cli.recipe.upstream_fields import SFT_CONFIG, TRAINING_ARGUMENTS, read_fields


@dataclass(frozen=True)
class Task:
    """What a model does with its input."""

    name: str
    peft_type: str
    """PEFT's `task_type`."""
    auto_class: str
    """transformers' class that loads such a model."""
    whole_class: str
    """transformers' class that loads a base of which such a model is a part, with the rest."""
    does: str
    """What such models do, to complete the sentence `models that …`."""

    def find_auto_class(self, config: Any) -> Any:
        """Return transformers' class that loads the base of a configuration, with all its parts:
        `auto_class` would leave the tower for pictures of some bases out, and refuse others."""
        transformers = importlib.import_module("transformers")
        whole = getattr(transformers, self.whole_class)
        is_part = config.get_text_config() is not config and type(config) in whole._model_mapping
        return whole if is_part else getattr(transformers, self.auto_class)


@dataclass(frozen=True)
class Objective:
    """What training minimises, and the configuration of the trainer that does it."""

    name: str
    trainer: str
    """TRL's trainer, by the name people know."""
    config: str
    """TRL's configuration class."""
    fields: tuple[tuple[str, str, str], ...]
    """Where the fields of that class are declared."""

    def find_config_class(self) -> Any:
        """Return TRL's configuration class."""
        return getattr(importlib.import_module("trl"), self.config)

    def list_own_fields(self) -> set[str]:
        """Return the fields of that class that transformers' own `TrainingArguments` lacks."""
        return read_fields(self.fields).keys() - read_fields(TRAINING_ARGUMENTS).keys()


TASKS = (
    Task(
        "causal_lm",
        "CAUSAL_LM",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "write text",
    ),
)
OBJECTIVES = (Objective("sft", "SFTTrainer", "SFTConfig", SFT_CONFIG),)
DEFAULT_TASK, DEFAULT_OBJECTIVE = TASKS[0], OBJECTIVES[0]


def find_task(peft_type: str | None) -> Task | None:
    """Return the task of an adapter by PEFT's `task_type`, or None where there is no such task.

    An adapter that does not name a task counts as one of the default task, as in PEFT.
    """
    if peft_type is None:
        return DEFAULT_TASK
    return next((task for task in TASKS if task.peft_type == peft_type), None)
