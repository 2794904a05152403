"""A recipe that is being written: its values in order, and what is said beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import escape
from lora_cli.recipe import Recipe, build_recipe, override_values, strict_yaml

SECTIONS = ("model", "lora", "quantization", "data", "training", "preference", "distributed")
ORDER = ("task", "objective", "method", "trainer", *SECTIONS, "output_dir")
KEYS = (
    *("name_or_path", "revision", "adapter", "chat_template", "r", "lora_alpha"),
    *("path", "eval_path", "split", "eval_fraction", "eval_rows", "format", "columns"),
    *("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_length", "max_target_length"),
)
"""The order of a section's keys; others follow."""
COLUMN = 36
"""Where a comment begins."""
ABSENT: Any = object()


class Draft:
    """Values of a recipe for the file `path`, under those that `overrides` (`section.key=value`)
    give. Raises UsageError for overrides that are none."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path, self.overrides = path, list(overrides)
        self.values: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.given: dict[str, Any] = override_values(
            strict_yaml.Document({}, {}), path, overrides
        ).data

    def put(self, key: str, value: Any, note: str = "") -> None:
        """Write `section.key`, or take it out where the value is None; `note` stands beside it. An
        override of it still holds."""
        self.values.pop(key, None)
        self.notes.pop(key, None)
        if value is not None:
            self.values[key] = value
            self.notes[key] = note

    def is_given(self, key: str) -> bool:
        """Return whether an override gives the value of `section.key`."""
        return _find(self.given, key) is not ABSENT

    def read(self, key: str) -> Any:
        """Return the value of `section.key` as it holds now; None where it has none."""
        found = _find(self.given, key)
        return self.values.get(key) if found is ABSENT else found

    def build(self) -> Recipe:
        """Return the recipe; UsageError for overrides that make it none."""
        parsed = strict_yaml.parse(self._write(_nest(self.values), ()), str(self.path))
        return build_recipe(parsed, self.path, self.overrides)

    def render(self, head: Sequence[str]) -> str:
        """Return the file, which begins with `head` as a comment."""
        plain = strict_yaml.parse(self._write(_nest(self.values), ()), str(self.path))
        data = override_values(plain, self.path, self.overrides).data
        return self._write(data, head)

    def _write(self, data: Mapping[str, Any], head: Sequence[str]) -> str:
        lines = [f"# {escape(line)}".rstrip() for line in head]
        for name in sorted(data, key=_place):
            if name in SECTIONS and isinstance(data[name], dict):
                lines += ["", f"{name}:"]
                lines += [
                    self._write_line(f"{name}.{key}", value, "  ")
                    for key, value in sorted(data[name].items(), key=_place_key)
                ]
            else:
                lines += [""] * (name == "output_dir")
                lines.append(self._write_line(name, data[name], ""))
        return "\n".join(lines).lstrip("\n") + "\n"

    def _write_line(self, key: str, value: Any, indent: str) -> str:
        line = f"{indent}{strict_yaml.spell(key.rpartition('.')[2])}: {strict_yaml.spell(value)}"
        note = "" if self.is_given(key) else escape(self.notes.get(key, ""))
        return f"{line:{COLUMN}}# {note}" if note else line


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _place_key(item: tuple[str, Any]) -> int:
    return KEYS.index(item[0]) if item[0] in KEYS else len(KEYS)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _find(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part, ABSENT) if isinstance(data, dict) else ABSENT
    return data
