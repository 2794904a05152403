"""Values that lora would refuse taken out of a draft again, until it is a recipe that loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError
from lora_cli.recipe import list_problems, strict_yaml
from lora_cli.translate.draft import Draft
from lora_cli.translate.write import write_recipe

REQUIRED = ("model.name_or_path", "data.path", "data.mix")
WORDS = {"yes": True, "on": True, "no": False, "off": False}
MOST = 200
"""Values that a draft has at the very most: each turn mends or drops one."""


def settle(draft: Draft, target: Path) -> str:
    """Return the text of the recipe at `target`, which loads.

    What is refused becomes what needs a hand, with lora's own words. LoraError for a model or rows
    that are refused: without them there is no recipe.
    """
    reread: set[str] = set()
    for _ in range(MOST):
        text = write_recipe(draft)
        problems = list_problems(text, target)
        if not problems:
            return text
        _mend(draft, problems[0], text, target, reread)
    raise AssertionError("each turn takes a value out of a finite number")


def _mend(
    draft: Draft, problem: tuple[str, str | None], text: str, target: Path, reread: set[str]
) -> None:
    """Mend the first problem: read a value anew, or take it out."""
    message, hint = problem
    key = _find_key(draft, message, text, target)
    said = message.removeprefix(f"{target}:").lstrip("0123456789").removeprefix(": ")
    if key is None or key in REQUIRED:
        raise LoraError(f"{draft.source.path}: as a recipe, {said}", hint)
    meant = _reread(draft.values[key])
    if meant is not None and key not in reread:
        draft.values[key] = meant
        reread.add(key)
    else:
        draft.drop(key, said + (f"; {hint}" if hint else ""))


def _find_key(draft: Draft, message: str, text: str, target: Path) -> str | None:
    """Return the recipe's key that a message is about: it begins with its line, or with its
    name."""
    found = re.match(rf"{re.escape(str(target))}:(\d+): ", message)
    if not found:
        named = re.match(r"[\w.]+", message)
        return named[0] if named and named[0] in draft.values else None
    line = int(found[1])
    here = [k for k, place in strict_yaml.parse(text, "").places.items() if place.line == line]
    for keys in here:
        for name in (".".join(map(str, keys[:2])), *map(str, keys[:1])):
            if name in draft.values:
                return name
    sections = [f"{keys[0]}." for keys in here if keys]
    return next((key for key in draft.values if key.startswith(tuple(sections))), None)


def _reread(value: Any) -> Any:
    """Return what a text, or a whole number with a point, means elsewhere; None where nothing
    else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return None
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        meant = json.loads(value.lower())
    except ValueError:
        return None
    return meant if isinstance(meant, (bool, int, float)) else None
