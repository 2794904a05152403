"""Say of a recipe what is not as usual: its differences from the defaults, and from other runs'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.recipe import Recipe
from lora_cli.report import answers
from lora_cli.report.seen import SeenRun, number

SECTIONS = ("model", "lora", "quantization", "data", "training", "preference", "distributed")
UNSHOWN = ("output_dir",)
"""What every run has another of."""
MISSING = "(not recorded)"


def list_defaults() -> dict[str, Any]:
    """Return the default of each key of a recipe that has one, by its dotted name."""
    found: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name not in SECTIONS:
            found |= {} if field.is_required() else {name: field.get_default()}
            continue
        section: Any = field.annotation
        for key, inner in section.model_fields.items():
            if not inner.is_required():
                found[f"{name}.{key}"] = inner.get_default(call_default_factory=True)
    return found


def flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        if name in SECTIONS and isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name not in UNSHOWN:
            found[name] = value
    return found


def list_own(record: SeenRun) -> list[dict[str, Any]]:
    """Return each value of a run's recipe that is not the default and that `auto` did not choose:
    `key`, `value`, `default`."""
    defaults = list_defaults()
    chosen = {each.get("name") for each in record.choices}
    return [
        {"key": answers.show(key), "value": plain(value), "default": plain(defaults.get(key))}
        for key, value in flatten(record.recipe).items()
        if key not in chosen and not _is_same(value, defaults.get(key, MISSING))
    ]


def list_chosen(record: SeenRun) -> list[dict[str, Any]]:
    """Return what `auto` became: `key`, `value` and the `reason`."""
    return [
        {
            "key": answers.show(str(each.get("name"))),
            "value": plain(each.get("value")),
            "reason": answers.show(str(each.get("reason") or "")),
        }
        for each in record.choices
    ]


def compare(records: Sequence[SeenRun]) -> list[dict[str, Any]]:
    """Return each key that runs have different values of: `key`, and their `values` in order."""
    recipes = [flatten(record.recipe) for record in records]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    found = []
    for key in keys:
        values = [recipe.get(key, MISSING) for recipe in recipes]
        if any(not _is_same(value, values[0]) for value in values[1:]):
            found.append({"key": answers.show(key), "values": [plain(value) for value in values]})
    return found


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def plain(value: Any) -> str | float | None:
    """Return a value as it is shown: numbers as they are, anything else as text."""
    if value is None:
        return None
    if (found := number(value)) is not None:
        return found
    return answers.show(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
