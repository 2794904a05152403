"""Values of a recipe that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_cli.recipe import initialisations
from lora_cli.recipe.keys import (
    Recipe,
    TrainingFields,
)


def list_contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Values that are right alone and wrong together."""
    dora = recipe.method in ("dora", "qdora")
    if recipe.lora.use_dora is not None and recipe.lora.use_dora != dora:
        says = str(recipe.lora.use_dora).lower()
        yield (
            f"{recipe.where('lora', 'use_dora')} is {says}, but method is {recipe.method}",
            "change one of them",
        )
    if recipe.source("quantization") and not recipe.quantized:
        place = recipe.where("quantization")
        yield (
            f"{place} has no effect with method: {recipe.method}",
            "use method: qlora, or remove the section",
        )
    ours, theirs = recipe.objective.name, recipe.objective.trainer
    if recipe.uses_trl and recipe.adapts_head:
        yield f"{recipe.where('trainer')}: {theirs} cannot adapt the output head", "trainer: auto"
    if recipe.trainer == "trainer" or (recipe.trainer == "auto" and recipe.adapts_head):
        own = recipe.objective.list_own_fields()
        for key in sorted(
            (recipe.training.model_fields_set & own) - TrainingFields.model_fields.keys()
        ):
            yield (
                f"{recipe.where('training', key)} works only with trainer: {ours}",
                (
                    f"trainer: {ours}"
                    if recipe.trainer == "trainer"
                    else f"{theirs} cannot adapt the output head: remove it"
                ),
            )
        if recipe.training.packing in (True, "dataset"):
            place = recipe.where("training", "packing")
            yield (
                f"{place}: packing the whole data set works only with trainer: {ours}",
                "packing: step",
            )
    if recipe.training.packing == "step" and getattr(recipe.training, "padding_free", None):
        place = recipe.where("training", "padding_free")
        yield f"{place} has no effect with training.packing: step", "remove one of them"
    if recipe.training.on_oom == "reduce" and recipe.training.save_only_model:
        place = recipe.where("training", "on_oom")
        yield (
            f"{place}: reduce goes on from a checkpoint, and save_only_model leaves out half of it",
            "remove one",
        )
    yield from _list_data_contradictions(recipe)
    training, given = recipe.training, recipe.training.model_fields_set
    if {"gradient_checkpointing", "activation_checkpointing"} <= given:
        place = recipe.where("training", "activation_checkpointing")
        yield f"{place} and training.gradient_checkpointing are one setting", "give one of them"
    yield from _list_init_contradictions(recipe)
    if Path(recipe.output_dir).resolve() in (Path.cwd(), *Path.cwd().parents):
        yield f"{recipe.where('output_dir')} must be a folder of its own", "output_dir: runs/NAME"
    if training.eval_strategy in ("steps", "epoch") and not (
        recipe.data.eval_path or recipe.data.eval_split
    ):
        place = recipe.where("training", "eval_strategy")
        yield f"{place} needs evaluation data", "set data.eval_path or data.eval_split"


def _list_data_contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """What is read is named once, and each column has one name."""
    data = recipe.data
    if data.path is None and data.mix is None:
        yield f"{recipe.where('data')} names nothing to train on", "add data.path, or data.mix"
    if data.mix is not None:
        for key in ("path", "name", "revision", "split", "format", "columns", "max_rows"):
            if getattr(data, key) != type(data).model_fields[key].get_default(
                call_default_factory=True
            ):
                yield (
                    f"{recipe.where('data', key)} and data.mix exclude each other",
                    f"give {key} within data.mix",
                )
        if data.eval_split and not data.eval_path:
            yield (
                f"{recipe.where('data', 'eval_split')} needs data.eval_path beside data.mix",
                "add data.eval_path",
            )
    if data.streaming:
        place = recipe.where("data", "streaming")
        if recipe.training.max_steps < 0:
            yield f"{place}: a stream has no end that a run could stop at", "add training.max_steps"
        if "train_sampling_strategy" in recipe.training.model_fields_set:
            place = recipe.where("training", "train_sampling_strategy")
            yield f"{place} has no effect with data.streaming", "use data.shuffle_buffer"
    for columns in [data.columns, *(rows.columns for rows in data.mix or [])]:
        names = list(columns.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            place = recipe.where("data", "columns" if columns is data.columns else "mix")
            yield f"{place} gives {', '.join(twice)} two names", "one name for each column"


def _list_init_contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Initialisations that the method does not allow, and their configurations without them."""
    found = initialisations.find_initialisation(recipe.lora.init_lora_weights)
    initial = found.name if found else None
    place = recipe.where("lora", "init_lora_weights")
    if recipe.quantized and found and found.needs_linear:
        yield (
            f"{place} needs the base's weights, which {recipe.method} stores in 4 bits",
            "use method: lora or dora",
        )
    if not recipe.quantized and initial == "loftq":
        yield (
            f"{place} makes up for 4-bit storage, which {recipe.method} does not have",
            "use method: qlora or qdora",
        )
    if recipe.method == "dora" and initial == "mica":
        yield f"{place} is not defined for DoRA", "use method: lora"
    if recipe.lora.lora_bias and isinstance(recipe.lora.init_lora_weights, str):
        place = recipe.where("lora", "lora_bias")
        yield f"{place} works only with init_lora_weights: true or false", "remove one of them"
    for name, config in initialisations.CONFIGS.items():
        if recipe.source("lora", config) and initial != name:
            place = recipe.where("lora", config)
            yield f"{place} has no effect", f"add lora.init_lora_weights: {name}, or remove it"
    training = recipe.training
    if training.loraplus_lr_embedding is not None and training.loraplus_lr_ratio is None:
        place = recipe.where("training", "loraplus_lr_embedding")
        yield f"{place} has no effect", "add training.loraplus_lr_ratio, or remove it"
