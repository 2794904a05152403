"""Recipes: their keys, the strict YAML they are written in, what is wrong with them in words, and
the objects that PEFT, TRL and transformers take.

Its doors, in the order a reader needs them:

    load_recipe                   a file with what it extends and overrides, checked, as a Recipe
    list_problems                 what is wrong with the text of a recipe that is not written yet
    build_recipe, override_values … the same of what is parsed; overrides laid over it
    list_recipes_in               the files of a folder that seem to be recipes
    Recipe                        the whole recipe, frozen, knowing where each value was written
    Data, Distributed, Lora, Model, Preference, Quantization, Training
                                  its sections; Rows is one data set of data.mix, Column a name
                                  of a column, DType a type that models are computed in
    shipped_recipes               the recipes that come with lora
    recipe_table                  … with their bases, rows, memory and time
    TASKS, DEFAULT_TASK, Task     what a model does with its input
    Objective, DEFAULT_OBJECTIVE, name_objective
                                  what its training minimises, found by its name
    PREFERENCE_METRICS            what is measured of pairs of answers
    UNPAIRED_METRICS              … of answers that are each wanted or not
    find_task, recognise_task     … found by PEFT's name of it, by a model's class
    find_initialisation           the table of values of lora.init_lora_weights
    INITIALISATION_SETTINGS       the fields of LoraConfig that hold an initialisation's settings
    list_contradictions           values that are right alone and wrong together
    NOT_IN_LORA                   the fields of LoraConfig that no recipe sets, and why
    upstream                      builds PEFT's, TRL's and transformers' objects; imports torch
    messages                      a validation error as the problems a user mends
    schema, strict_yaml           the keys for editors and readers; the YAML parser
"""

from lora_cli.recipe.contradictions import list_contradictions
from lora_cli.recipe.initialisations import INITIALISATION_SETTINGS, find_initialisation
from lora_cli.recipe.keys import (
    NOT_IN_LORA,
    Column,
    Data,
    Distributed,
    DType,
    Lora,
    Model,
    Preference,
    ProblemType,
    Quantization,
    Recipe,
    Rows,
    Training,
)
from lora_cli.recipe.load import build_recipe, list_problems, load_recipe, override_values
from lora_cli.recipe.not_recipes import list_recipes_in
from lora_cli.recipe.tasks import (
    DEFAULT_OBJECTIVE,
    DEFAULT_TASK,
    PREFERENCE_METRICS,
    TASKS,
    UNPAIRED_METRICS,
    Objective,
    Task,
    find_task,
    name_objective,
    recognise_task,
)

__all__ = [
    "DEFAULT_OBJECTIVE",
    "DEFAULT_TASK",
    "Column",
    "DType",
    "Data",
    "Distributed",
    "INITIALISATION_SETTINGS",
    "Lora",
    "Model",
    "NOT_IN_LORA",
    "Objective",
    "PREFERENCE_METRICS",
    "Preference",
    "ProblemType",
    "Quantization",
    "Recipe",
    "Rows",
    "TASKS",
    "Task",
    "Training",
    "UNPAIRED_METRICS",
    "build_recipe",
    "find_initialisation",
    "find_task",
    "list_contradictions",
    "list_problems",
    "list_recipes_in",
    "load_recipe",
    "messages",
    "name_objective",
    "override_values",
    "recipe_table",
    "recognise_task",
    "schema",
    "shipped_recipes",
    "strict_yaml",
    "upstream",
]
