"""A recipe's file: YAML, what it extends and `--set` become one `Recipe`, or all problems at once with line and fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_cli.common import privacy as private
from lora_cli.common.errors import UsageError, nearest, one_error
from lora_cli.recipe import strict_yaml as yamlfile
from lora_cli.recipe import upstream_fields as fields
from lora_cli.recipe.keys import (
    INITIAL_CONFIGS,
    NOT_IN_LORA,
    NOT_IN_TRAINING,
    RENAMED,
    Recipe,
    Rows,
    Section,
    TrainingFields,
)
from lora_cli.recipe.strict_yaml import Document, Keys, Place


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and `section.key=value` overrides. UsageError lists every problem at once."""
    document = _read_chain(path, ())
    if not isinstance(document.data, dict):
        raise UsageError(f"{path}: a recipe has sections such as model: and data:", "lora schema")
    for text in overrides:
        override = _override(text)
        if "extends" in override.data:
            raise UsageError(f"--set {text}: extends belongs in the file", "--set overrides other values")
        document = _merge(document, override)
    if not document.data:
        raise UsageError(f"{path}: a recipe has sections such as model: and data:", "lora schema")
    if secret := private.held(document.data):
        raise UsageError(
            f"{path}: the recipe holds the value of {secret}, and it is written to the run's folder",
            "take it out: what needs it reads the environment",
        )
    document.data.pop("extends", None)
    _expand_home(document.data)
    document.data.setdefault("output_dir", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise one_error(f"in {path}", list(_problems(error, document))) from None
    recipe._places = document.places
    if contradictions := list(_contradictions(recipe)):
        raise one_error(f"in {path}", contradictions)
    return recipe


HOME_PATHS = {"model": ("name_or_path", "chat_template"), "data": ("path", "eval_path"), "": ("output_dir",)}
"""Keys whose value may be a path, by section: there `~/` is the user's home folder, which only a shell knows else."""


def _expand_home(data: dict[str, Any]) -> None:
    """Replace `~/` in paths of the recipe's data, in place."""
    sections = [(data.get(name) if name else data, keys) for name, keys in HOME_PATHS.items()]
    mix = data["data"].get("mix") if isinstance(data.get("data"), dict) else None
    sections += [(rows, ("path",)) for rows in (mix if isinstance(mix, list) else [])]
    for section, keys in sections:
        if isinstance(section, dict):
            section |= {key: _expanded(section[key]) for key in keys if key in section}


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return private.expanded(value) if isinstance(value, str) else value


def _read_chain(path: Path, above: tuple[Path, ...]) -> Document:
    """The file merged over the recipe it extends, that one over its own, and so on."""
    document = yamlfile.read(path)
    parent = document.data.get("extends") if isinstance(document.data, dict) else None
    if parent is None:
        return document
    place = document.places[("extends",)]
    if not isinstance(parent, str):
        raise UsageError(f"{place}: extends must be the path of one recipe", "extends: base.yaml")
    base = path.parent / parent
    if base.resolve() in [file.resolve() for file in (*above, path)]:
        circle = " -> ".join(map(str, (*above, path, base)))
        raise UsageError(f"{place}: extends goes in a circle: {circle}", "remove one")
    if not base.is_file():
        why = "is no file" if base.exists() else "does not exist"
        raise UsageError(f"{place}: {base}, which it extends, {why}", "the path is relative to this file")
    return _merge(_read_chain(base, (*above, path)), document)


def _merge(below: Document, above: Document) -> Document:
    """`above` laid over `below`: sections join, other values (lists too) are replaced."""
    if not (isinstance(below.data, dict) and isinstance(above.data, dict)):
        return Document(above.data, {**below.places, **above.places})
    data, places = dict(below.data), {**below.places, **above.places}
    for key, value in above.data.items():
        data[key] = (
            _merge(Document(data[key], {}), Document(value, {})).data
            if isinstance(value, dict) and isinstance(data.get(key), dict)
            else value
        )
    return Document(data, places)


def _override(text: str) -> Document:
    """`section.key=value` as a document whose places are the option itself."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: expected section.key=value", "--set training.learning_rate=1e-4")
    document = yamlfile.parse(value, f"--set {text}", first_line=0)
    data, keys = document.data if document.places else value, tuple(key.split("."))
    places: dict[Keys, Place] = {(*keys, *inner): place for inner, place in document.places.items()}
    for depth in range(1, len(keys) + 1):
        places[keys[:depth]] = Place(f"--set {text}", 0)
    for part in reversed(keys):
        data = {part: data}
    return Document(data, places)


def _problems(error: ValidationError, document: Document) -> Iterator[tuple[str, str | None]]:
    """One (message, hint) for each wrong key, however many alternatives of its type refused it."""
    by_key: dict[Keys, list[Any]] = {}
    for detail in error.errors():
        keys: Keys = ()
        for part in detail["loc"]:  # beyond the data, loc goes on with names of union members
            if detail["type"] != "missing" and (*keys, part) not in document.places:
                break
            keys = (*keys, part)
        by_key.setdefault(keys, []).append(detail)
    for keys, details in sorted(by_key.items(), key=lambda item: _nearest_place(item[0], document).line):
        name, place = ".".join(map(_spelt, keys)), _nearest_place(keys, document)
        if details[0]["type"] == "extra_forbidden":
            message, hint = _unknown_key(keys)
            yield f"{place}: {message}", hint
        elif details[0]["type"] == "missing":
            yield f"{place}: {name} is missing", f"add {name}"
        else:
            allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details))
            wrong = details[0]["input"]
            yield f"{place}: {name} is {_shown(wrong)}, but must be {allowed}", _instead(keys, wrong, details)


def _spelt(key: str | int) -> str:
    """A key as it may stand in a line: one that is long, or not of printable characters, is quoted and cut."""
    text = str(key)
    return text if text.isprintable() and 0 < len(text) <= 40 else _shown(text)


def _nearest_place(keys: Keys, document: Document) -> Place:
    while keys not in document.places:
        keys = keys[:-1]
    return document.places[keys]


def _unknown_key(keys: Keys) -> tuple[str, str]:
    """What to say of a key that no section has."""
    *section, key = map(_spelt, keys)
    name = ".".join([*section, key])
    elsewhere = {"lora": NOT_IN_LORA, "training": NOT_IN_TRAINING}.get(section[0] if section else "", {})
    if key in elsewhere:
        return f"{name} cannot be set", elsewhere[key]
    if key in RENAMED:
        return f"{name} is not a known key", f"it is called {RENAMED[key]}"
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    sections = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
    homes = [parent for parent, model in sections.items() if key in model.model_fields]
    if homes:
        return f"{name} is not a known key", f"{key} belongs in the section {homes[0]}"
    known = sections[section[0]].model_fields if section and section[0] in sections else Recipe.model_fields
    if section[:2] == ["data", "mix"]:
        known = Rows.model_fields
    guess = nearest(key, known)
    return f"{name} is not a known key", (
        f"did you mean {'.'.join([*section, guess])}?" if guess else "lora schema --markdown lists every key"
    )


def _instead(keys: Keys, wrong: Any, details: Sequence[Any]) -> str:
    """What to write in place of a wrong value: the word that was meant, or the default."""
    expected = " ".join(str(detail.get("ctx", {}).get("expected", "")) for detail in details)
    if isinstance(wrong, str) and (guess := nearest(wrong, re.findall(r"'([^']+)'", expected))):
        return f"did you mean {guess}?"
    kind: Any = Recipe
    for key in keys[:-1]:
        field = kind.model_fields.get(str(key)) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        kind = field.annotation if field else None
    field = kind.model_fields.get(str(keys[-1])) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    if field is None or field.is_required() or isinstance(field.get_default(call_default_factory=True), BaseModel):
        return "lora schema --markdown describes every key"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "leave it out"
    return f"leave it out for its default, {_shown(default)}"


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "none_required": "null",
    "string_too_short": "some text",
    "too_short": "a list with something in it",
}


def _allowed(detail: Any) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return str(context["expected"])
    if detail["type"] == "string_pattern_mismatch":
        return f"text matching {context['pattern']}"
    if detail["type"] in _KINDS:
        return _KINDS[detail["type"]]
    return detail["msg"].removeprefix("Input should be ").replace("Input should", "it should")


def _shown(value: Any) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Values that are right alone and wrong together."""
    dora = recipe.method in ("dora", "qdora")
    if recipe.lora.use_dora is not None and recipe.lora.use_dora != dora:
        says = str(recipe.lora.use_dora).lower()
        yield f"{recipe.where('lora', 'use_dora')} is {says}, but method is {recipe.method}", "change one of them"
    if recipe.source("quantization") and not recipe.quantized:
        place = recipe.where("quantization")
        yield f"{place} has no effect with method: {recipe.method}", "use method: qlora, or remove the section"
    if recipe.trainer == "sft" and recipe.adapts_head:
        yield f"{recipe.where('trainer')}: SFTTrainer cannot adapt the output head", "trainer: auto"
    if recipe.trainer == "trainer" or (recipe.trainer == "auto" and recipe.adapts_head):
        sft_only = fields.read(fields.SFT_CONFIG).keys() - fields.read(fields.TRAINING_ARGUMENTS).keys()
        for key in sorted((recipe.training.model_fields_set & sft_only) - TrainingFields.model_fields.keys()):
            yield (
                f"{recipe.where('training', key)} works only with trainer: sft",
                (
                    "trainer: sft"
                    if recipe.trainer == "trainer"
                    else "SFTTrainer cannot adapt the output head: remove it"
                ),
            )
        if recipe.training.packing in (True, "dataset"):
            place = recipe.where("training", "packing")
            yield f"{place}: packing the whole data set works only with trainer: sft", "packing: step"
    if recipe.training.packing == "step" and getattr(recipe.training, "padding_free", None):
        place = recipe.where("training", "padding_free")
        yield f"{place} has no effect with training.packing: step", "remove one of them"
    if recipe.training.on_oom == "reduce" and recipe.training.save_only_model:
        place = recipe.where("training", "on_oom")
        yield f"{place}: reduce goes on from a checkpoint, and save_only_model leaves out half of it", "remove one"
    yield from _data_contradictions(recipe)
    training, given = recipe.training, recipe.training.model_fields_set
    if {"gradient_checkpointing", "activation_checkpointing"} <= given:
        place = recipe.where("training", "activation_checkpointing")
        yield f"{place} and training.gradient_checkpointing are one setting", "give one of them"
    yield from _initial_contradictions(recipe)
    if Path(recipe.output_dir).resolve() in (Path.cwd(), *Path.cwd().parents):
        yield f"{recipe.where('output_dir')} must be a folder of its own", "output_dir: runs/NAME"
    if training.eval_strategy in ("steps", "epoch") and not (recipe.data.eval_path or recipe.data.eval_split):
        place = recipe.where("training", "eval_strategy")
        yield f"{place} needs evaluation data", "set data.eval_path or data.eval_split"


def _data_contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """What is read is named once, and each column has one name."""
    data = recipe.data
    if data.path is None and data.mix is None:
        yield f"{recipe.where('data')} names nothing to train on", "add data.path, or data.mix"
    if data.mix is not None:
        for key in ("path", "name", "revision", "split", "format", "columns", "max_rows"):
            if getattr(data, key) != type(data).model_fields[key].get_default(call_default_factory=True):
                yield f"{recipe.where('data', key)} and data.mix exclude each other", f"give {key} within data.mix"
        if data.eval_split and not data.eval_path:
            yield f"{recipe.where('data', 'eval_split')} needs data.eval_path beside data.mix", "add data.eval_path"
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


def _initial_contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Initialisations that the method does not allow, and their configurations without them."""
    initial = str(recipe.lora.init_lora_weights).partition("_niter")[0]
    place = recipe.where("lora", "init_lora_weights")
    if recipe.quantized and initial in ("pissa", "olora", "corda", "lora_ga", "mica", "orthogonal"):
        yield f"{place} needs the base's weights, which {recipe.method} stores in 4 bits", "use method: lora or dora"
    if not recipe.quantized and initial == "loftq":
        yield f"{place} makes up for 4-bit storage, which {recipe.method} has not", "use method: qlora or qdora"
    if recipe.method == "dora" and initial == "mica":
        yield f"{place} is not defined for DoRA", "use method: lora"
    if recipe.lora.lora_bias and isinstance(recipe.lora.init_lora_weights, str):
        place = recipe.where("lora", "lora_bias")
        yield f"{place} works only with init_lora_weights: true or false", "remove one of them"
    for name, config in INITIAL_CONFIGS.items():
        if recipe.source("lora", config) and initial != name:
            place = recipe.where("lora", config)
            yield f"{place} has no effect", f"add lora.init_lora_weights: {name}, or remove it"
    training = recipe.training
    if training.loraplus_lr_embedding is not None and training.loraplus_lr_ratio is None:
        place = recipe.where("training", "loraplus_lr_embedding")
        yield f"{place} has no effect", "add training.loraplus_lr_ratio, or remove it"
