"""What an adapter says of itself in adapter_config.json, checked before anything of it is
believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, ui
from lora_cli.recipe import TASKS, find_task

TEXTS = (list, str, type(None))
NUMBER = (int, float)
# The types of what PEFT and lora read of it; PEFT itself looks at few of them
TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "bias": (str,),
    "target_modules": TEXTS,
    "exclude_modules": TEXTS,
    "modules_to_save": (list, type(None)),
    "target_parameters": (list, type(None)),
    "layers_pattern": TEXTS,
    "layers_to_transform": (list, int, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "init_lora_weights": (bool, str, type(None)),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "lora_bias": (bool,),
    "fan_in_fan_out": (bool,),
    "task_type": (str, type(None)),
}
INSIDE: dict[str, tuple[type, ...]] = {
    "target_modules": (str,),
    "exclude_modules": (str,),
    "modules_to_save": (str,),
    "target_parameters": (str,),
    "layers_pattern": (str,),
    "layers_to_transform": (int,),
    "rank_pattern": (int,),
    "alpha_pattern": NUMBER,
    "trainable_token_indices": (int, list),
}
"""Of the items of lists and the values of mappings."""
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    bool: "true or false",
}


def check_fields(file: Path, config: Mapping[str, Any]) -> None:
    """LoraError for the first field of the adapter configuration in `file` that has not its type,
    or no possible value.

    Fields that are not known here are PEFT's to judge.
    """
    for problem in _walk_problems(config):
        raise LoraError(f"{file}: {problem}", "copy the adapter again, or mend the file")


def refuse_other_task(folder: Path, task: Any) -> None:
    """LoraError for an adapter of a model that classifies, or embeds: its head is not among its
    tensors."""
    if find_task(task) is None:
        known = " or ".join(each.does for each in TASKS)
        raise LoraError(
            f"{folder} is an adapter for {task}, not for models that {known}", "use PEFT itself"
        )


def _walk_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name, kinds in TYPES.items():
        if name in config and not _is(config[name], kinds):
            yield f"{name} is {_show(config[name])}, but must be {_name_kinds(kinds)}"
    for name, kinds in INSIDE.items():
        given = config.get(name)
        for item in (
            given.values() if isinstance(given, dict) else given if isinstance(given, list) else ()
        ):
            if not _is(item, kinds):
                yield f"{name} holds {_show(item)}, where each must be {_name_kinds(kinds)}"
    for name in ("rank_pattern", "alpha_pattern"):
        for item in (config.get(name) or {}).values():
            if item <= 0:
                yield f"{name} holds {_show(item)}, where each must be over 0"
    for name in ("r", "lora_alpha"):
        if name in config and config[name] <= 0:
            yield f"{name} is {_show(config[name])}, but must be over 0"
    ids = config.get("trainable_token_indices") or []
    for item in (
        [inner for each in ids.values() for inner in (each if isinstance(each, list) else [each])]
        if isinstance(ids, dict)
        else ids
    ):
        if not _is(item, (int,)) or item < 0:
            what = f"trainable_token_indices holds {_show(item)}"
            yield f"{what}, where each must be a row, counted from 0"


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is of one of these kinds: true and false are no numbers, and neither are NaN and
    infinity."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, float) or abs(value) < float("inf"))


def _name_kinds(kinds: tuple[type, ...]) -> str:
    return " or ".join(
        KINDS.get(kind, "null") for kind in kinds if kind is not int or float not in kinds
    )


def _show(value: Any) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 40 else text[:37] + "…"


def refuse_other_ranks(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """LoraError for a rank that no tensor has: PEFT would make matrices of it before it sees that
    none fits."""
    largest = max((max(shape) for shape in shapes.values() if shape), default=1)
    for rank in [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]:
        if rank > largest:
            raise LoraError(
                f"{folder / 'adapter_config.json'}: a rank of {_show(rank)}, and no tensor of the "
                "adapter is as large",
                "copy the adapter again: its configuration and its weights are of two adapters",
            )


def refuse_other_base(folder: Path, named: Any, recorded: Any) -> None:
    """LoraError where the adapter's configuration names another base than our record of its
    training."""
    if named and recorded and named != recorded:
        raise LoraError(
            f"{folder}: adapter_config.json names the base {named}, and our record of its "
            f"training {recorded}",
            f"--base {recorded} if the record is right: somebody has changed one of the two files",
        )


@cache
def announce_base(folder: Path, base: str, revision: str | None) -> None:
    """Say, once, which base an adapter made elsewhere names, before anything of that base is
    opened."""
    at = f" at {revision}" if revision else ""
    ui.say(f"{folder} was made elsewhere: by its own word, its base is {base}{at}")
