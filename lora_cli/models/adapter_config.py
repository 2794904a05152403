"""Check adapter_config.json before anything in it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from peft import LoraConfig
from pydantic import ConfigDict, ValidationError

from lora_cli.common import LoraError, quote, ui
from lora_cli.recipe import (
    INITIALISATION_SETTINGS,
    NOT_IN_LORA,
    TASKS,
    Lora,
    find_initialisation,
    find_task,
    messages,
    strict_yaml,
)


class SavedConfig(Lora):
    """The fields of adapter_config.json that lora reads: those of a recipe, and what PEFT adds."""

    model_config = ConfigDict(extra="ignore")

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


def check_fields(file: Path, config: Mapping[str, Any]) -> None:
    """Raise LoraError for the first field of the adapter configuration in `file` whose value the
    same field of a recipe would not take.

    Fields that a recipe does not have are PEFT's to judge.
    """
    given = {name: value for name, value in config.items() if not _is_unset(name, value)}
    try:
        SavedConfig.model_validate(given)
    except ValidationError as error:
        places = dict.fromkeys(_walk_keys(given), strict_yaml.Place(str(file), 0))
        message, _ = next(messages.list_problems(error, strict_yaml.Document(given, places)))
        raise LoraError(message, "copy the adapter again, or mend the file") from None
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if others := sorted(name for name, value in config.items() if name not in known and value):
        warn_of_unknown_fields(file, *others)


def read_lora_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe's `lora:` says where it describes the adapter of this configuration,
    which `check_fields` has passed; PEFT's default where a field is missing."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    }
    given = {
        name: value
        for name, value in (defaults | dict(config)).items()
        if name in Lora.model_fields and not _is_unset(name, value)
    }
    # an adapter may have parameters only: no targets are all-linear in a recipe alone
    targets = given.get("target_modules", [])
    given["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    if given.get("init_lora_weights") != "mica":  # which is also how it is trained
        given["init_lora_weights"] = True
    for settings in INITIALISATION_SETTINGS:
        given.pop(settings, None)
    return given


def refuse_untrainable(adapter: str, config: Mapping[str, Any]) -> None:
    """Raise LoraError for an adapter that no run of ours could go on training as what it is."""
    written = str(config.get("init_lora_weights"))
    start = find_initialisation(config.get("init_lora_weights"))
    if start and start.changes_base_at_load:
        raise LoraError(
            f"{adapter} starts from {written}, which PEFT takes out of the base anew at each load",
            f"lora merge {quote(adapter)} OUT, and a new adapter on that model",
        )
    fields = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, value in config.items():
        if not value or name in UNTRAINED or value == fields.get(name):
            continue
        if name not in fields:
            raise LoraError(
                f"{adapter} sets {name}, which the installed PEFT does not know, and would train "
                "without it",
                "pip install -U peft",
            )
        if name in NOT_IN_LORA:
            raise LoraError(f"{adapter} sets {name}: {NOT_IN_LORA[name]}", "train a new adapter")


UNTRAINED = ("peft_type", "task_type", "inference_mode", "runtime_config", "loftq_config")
"""Fields that say nothing of how the adapter is trained."""


@cache
def warn_of_unknown_fields(file: Path, *names: str) -> None:
    """Warn, once, of fields that are set and that the installed PEFT does not know."""
    ui.warn(
        f"{file}: the installed PEFT does not know {', '.join(names)}: what that does to the "
        "adapter is left out (pip install -U peft)"
    )


def _is_unset(name: str, value: Any) -> bool:
    """Return whether the field is empty, and PEFT's default is too: PEFT saves an empty list,
    mapping or text as it was given, where a recipe leaves the key out."""
    nothing: tuple[Any, ...] = (None, [], {})
    return value in (*nothing, "") and getattr(LoraConfig, name, None) in nothing


def _walk_keys(value: Any, keys: strict_yaml.Keys = ()) -> Iterator[strict_yaml.Keys]:
    """Yield the path of every key and list item in `value`."""
    yield keys
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, inner in inside:
        yield from _walk_keys(inner, (*keys, key))


def refuse_other_task(folder: Path, task: Any) -> None:
    """Raise LoraError for an adapter of a model that classifies or embeds: its head is not among
    its tensors."""
    if find_task(task) is None:
        known = " or ".join(each.does for each in TASKS)
        raise LoraError(
            f"{folder} is an adapter for {task}, not for models that {known}", "use PEFT itself"
        )


def refuse_other_ranks(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise LoraError for a rank larger than any tensor: PEFT would allocate matrices of it before
    it notices that none fits."""
    largest = max((max(shape) for shape in shapes.values() if shape), default=1)
    for rank in [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]:
        if rank > largest:
            raise LoraError(
                f"{folder / 'adapter_config.json'}: the rank {rank} is larger than any tensor of "
                "the adapter",
                "copy the adapter again: its configuration and its weights are of two adapters",
            )


def refuse_other_base(adapter: str, named: Any, recorded: Any) -> None:
    """Raise LoraError where the adapter's configuration and the record of its training name
    different bases."""
    if named and recorded and named != recorded:
        raise LoraError(
            f"{adapter}: adapter_config.json names the base {named}, but the record of its "
            f"training names {recorded}",
            f"--base {quote(recorded)} if the record is right: somebody has changed one of the two "
            "files",
        )


@cache
def announce_base(adapter: str, base: str, revision: str | None) -> None:
    """Say, once, which base an adapter made elsewhere names, before anything of that base is
    opened."""
    at = f" at {revision}" if revision else ""
    ui.say(f"{adapter} was made elsewhere; it names as its base {base}{at}")
