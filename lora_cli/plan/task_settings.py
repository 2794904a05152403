"""What a task other than writing settles before all else: its labels, and which modules are its
head.

Both are written into the recipe, so that planning, training, resuming and merging go by the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from lora_cli.common import LoraError, UsageError, find_nearest, spell_count
from lora_cli.data import labels, load
from lora_cli.models import Base, find_alike, find_statistics, shorten_names
from lora_cli.plan import picture_settings
from lora_cli.plan.auto_choices import Choice
from lora_cli.recipe import Recipe
from lora_cli.scoring import measures

SHOWN = 6
"""How many labels are listed where they are said."""
LENGTH_GROUPS = "training.train_sampling_strategy"


def settle_labels(recipe: Recipe) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with its model's labels and what kind they are, and the choices made.

    Raises LoraError where the data have no labels that can be told apart.
    """
    choices: list[Choice] = []
    recipe = _settle_long_rows(recipe, choices)
    task, model = recipe.task_row, recipe.model
    if not task.counts_labels:
        return recipe, choices
    if "auto" in (model.labels, model.problem_type):
        found = labels.find_labels(recipe, load.find_encoder(task))
        if model.labels == "auto":
            choices.append(Choice("model.labels", found.labels, "those of the data, sorted"))
        if model.problem_type == "auto":
            reason = "each word has one" if task.places_labels else "as the labels of the data are"
            choices.append(Choice("model.problem_type", found.problem_type, reason))
        settled = {choice.name.partition(".")[2]: choice.value for choice in choices}
        recipe = recipe.replace(recipe.trainer, {"model": settled})
    return recipe, choices


def _refuse_other_metric(recipe: Recipe) -> None:
    """Raise UsageError for a best model by what is not measured of such labels, or is better where
    it is smaller without that being said."""
    given = getattr(recipe.training, "metric_for_best_model", None)
    if given is None:
        return
    name = given.removeprefix("eval_")
    place = recipe.where("training", "metric_for_best_model")
    known = ("loss", *measures.list_metrics(recipe.task_row, recipe.model.problem_type))
    if name not in known:
        guess = find_nearest(name, known)
        raise UsageError(
            f"{place}: {name} is not measured here; there are {', '.join(known)}",
            f"did you mean {guess}?" if guess else f"metric_for_best_model: {known[1]}",
        )
    if (
        name in measures.SMALLER
        and getattr(recipe.training, "greater_is_better", None) is not False
    ):
        raise UsageError(
            f"{place}: a model of a smaller {name} is better",
            "add training.greater_is_better: false",
        )


def _settle_long_rows(recipe: Recipe, choices: list[Choice]) -> Recipe:
    """Return the recipe with what becomes of long rows where it does not say and the task has its
    own way."""
    usual = recipe.task_row.long_rows[0]
    if "on_long_row" in recipe.data.model_fields_set or recipe.data.on_long_row == usual:
        return recipe
    choices.append(Choice("data.on_long_row", usual, f"as {recipe.task} does"))
    return recipe.replace(recipe.trainer, {"data": {"on_long_row": usual}})


def settle_head(recipe: Recipe, base: Base, choices: list[Choice]) -> Recipe:
    """Return the recipe with the head of its model among the modules that are trained whole and
    never stored in 4 bits, and padding kept small; add the choices made to `choices`.

    Raises LoraError where the base's files lack more than a head, UsageError where nothing of it
    can be adapted, or stored as the method says.
    """
    if recipe.task_row.writes_next_tokens:
        return recipe
    _refuse_other_metric(recipe)
    try:
        head = list(base.head.modules)
    except LoraError as error:
        raise error.with_message(f"model.name_or_path: {error.message}") from error
    network = base.build_empty()
    changes: dict[str, dict[str, object]] = {"lora": {}, "quantization": {}, "training": {}}
    changes["lora"] |= _settle_whole(recipe, network, head, choices)
    if base.task.reads_pictures:
        changes["lora"] |= picture_settings.settle_targets(recipe, network, head, choices)
    skipped = recipe.quantization.llm_int8_skip_modules or []
    if recipe.quantized and (new := [name for name in head if name not in skipped]):
        changes["quantization"]["llm_int8_skip_modules"] = [*skipped, *new]
        reason = "a head is not stored in 4 bits"
        choices.append(Choice("quantization.llm_int8_skip_modules", [*skipped, *new], reason))
    key = LENGTH_GROUPS.partition(".")[2]
    fixed = key in recipe.training.model_fields_set or recipe.data.streaming
    if not fixed and not base.task.reads_pictures:
        changes["training"][key] = "group_by_length"
        choices.append(Choice(LENGTH_GROUPS, "group_by_length", "less padding"))
    return recipe.replace(recipe.trainer, changes)


def _settle_whole(
    recipe: Recipe, network: PreTrainedModel, head: Sequence[str], choices: list[Choice]
) -> dict[str, object]:
    """Return the keys of `lora` that change as modules are trained whole: the head, and those that
    keep means and variances, which are no part of an adapter."""
    statistics = find_statistics(network)
    given = recipe.lora.modules_to_save or []
    inside = [
        path for path in statistics if not f"{path}.".startswith(tuple(f"{it}." for it in head))
    ]
    alike = find_alike(network, head)
    wanted = dict.fromkeys([*head, *shorten_names(network, inside), *alike])
    new = [name for name in wanted if name not in given]
    if not new:
        return {}
    reason = "the head, trained whole: the base's files lack it, or PEFT saves it so"
    if inside:
        modules = spell_count(len(inside), "module")
        reason += f"; and {modules} with means and variances, which training changes"
    if alike:
        reason += f"; and {len(alike)} norms whose names end as a head's does, as PEFT takes them"
    choices.append(Choice("lora.modules_to_save", [*given, *new], reason))
    return {"modules_to_save": [*given, *new]}
