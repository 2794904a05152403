"""Recipes that the libraries refuse, told as that.

A recipe reaches every field of PEFT's, TRL's and transformers' configurations. lora checks their names and types, and
that the configurations can be built. What else is wrong with a value, such as the name of a scheduler's argument, comes
to light when a library first uses it, in an exception of any type.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.common import library_errors
from lora_cli.common.errors import LoraError
from lora_cli.recipe.keys import LoraFields, Recipe, TrainingFields

PACKAGE = Path(__file__).parent
ANYWAY = (ValueError, TypeError, ImportError, ArithmeticError)
"""What the libraries raise on purpose: a refusal even where the recipe says nothing of their own fields."""
SHOWN = 3


@contextmanager
def translate_refusals(recipe: Recipe, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What the libraries raise inside until something has `begun()` is a LoraError in their words; it names the values
    that lora passes on. What is raised by a line of lora is a bug of lora's, and stays what it is."""
    try:
        yield
    except Exception as error:
        passed = list_passed_on(recipe)
        known = isinstance(error, LoraError) or library_errors.translate(error) is not None
        ours = PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents
        if known or ours or begun() or not (passed or isinstance(error, ANYWAY)):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        hint = f"change or remove {' or '.join(passed[:SHOWN])}" if passed else "lora doctor"
        raise LoraError(f"transformers, TRL or PEFT refuse this recipe: {said}", hint) from error


def list_passed_on(recipe: Recipe) -> list[str]:
    """Where the recipe sets fields of the libraries that lora itself has no use for, with file and line."""
    sections = (("lora", recipe.lora, LoraFields), ("training", recipe.training, TrainingFields))
    return [
        recipe.where(name, key)
        for name, section, own in sections
        for key in sorted(section.model_fields_set - own.model_fields.keys())
        if recipe.source(name, key)
    ]
