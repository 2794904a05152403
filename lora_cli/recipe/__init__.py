"""Recipes: keys, strict YAML, messages, schema, and the objects that PEFT, TRL and transformers take."""

from lora_cli.recipe.keys import Data, Model, Recipe, Rows, Section, Training
from lora_cli.recipe.load import load_recipe

__all__ = [
    "Data",
    "Model",
    "Recipe",
    "Rows",
    "Section",
    "Training",
    "load_recipe",
    "schema",
    "strict_yaml",
    "upstream",
]
