"""Recipes: keys, strict YAML, messages, schema, and the objects that PEFT, TRL and transformers
take."""

from lora_cli.recipe.initialisations import find_initialisation
from lora_cli.recipe.keys import Data, Lora, Model, Recipe, Rows, Section, Training
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.tasks import DEFAULT_TASK, TASKS, Task, find_task

__all__ = [
    "DEFAULT_TASK",
    "Data",
    "Lora",
    "Model",
    "Recipe",
    "Rows",
    "Section",
    "TASKS",
    "Task",
    "Training",
    "find_initialisation",
    "find_task",
    "load_recipe",
    "messages",
    "schema",
    "strict_yaml",
    "upstream",
]
