"""Say what is wrong with a recipe's keys: file, line, key, and what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lora_cli.common import find_nearest, quote
from lora_cli.recipe.keys import (
    NOT_IN_LORA,
    NOT_IN_TRAINING,
    RENAMED,
    Recipe,
    Rows,
    Section,
)
from lora_cli.recipe.strict_yaml import Document, Keys, Place
from lora_cli.recipe.tasks import name_objective


def list_problems(error: ValidationError, document: Document) -> Iterator[tuple[str, str | None]]:
    """Yield one (message, hint) for each wrong key, however many alternatives of its type refused
    it."""
    by_key: dict[Keys, list[Any]] = {}
    for detail in error.errors():
        by_key.setdefault(_find_keys(detail, document), []).append(detail)
    for keys in {outer for inner in by_key for outer in _parents(inner)} & by_key.keys():
        del by_key[keys]  # the alternative of the type that got further says what is wrong
    for keys, details in sorted(
        by_key.items(), key=lambda item: find_place(item[0], document).line
    ):
        name, place = spell_keys(keys), find_place(keys, document)
        if details[0]["type"] == "extra_forbidden":
            message, hint = _explain_unknown_key(keys)
            yield f"{place}: {message}", hint
        elif details[0]["type"] == "missing":
            yield f"{place}: {name} is missing", f"add {name}"
        else:
            words = dict.fromkeys(_describe_allowed(detail) for detail in details)
            if words.keys() & {"a number", "a finite number"}:
                words.pop("a whole number", None)
            allowed = " or ".join(words)
            wrong = details[0]["input"]
            yield (
                f"{place}: {name} is {_show(wrong)}, but must be {allowed}",
                _quote_text(keys, place, details) or _suggest_value(keys, wrong, details, document),
            )


def _find_keys(detail: Any, document: Document) -> Keys:
    """Return the keys of the data in an error's location, which also names the members of
    unions."""
    keys: Keys = ()
    for part in detail["loc"]:
        if (*keys, part) in document.places:
            keys = (*keys, part)
    return (*keys, detail["loc"][-1]) if detail["type"] == "missing" else keys


def _parents(keys: Keys) -> list[Keys]:
    return [keys[:depth] for depth in range(len(keys))]


def spell_keys(keys: Keys) -> str:
    """Return the path of keys as it is named in a message."""
    return ".".join(map(_spell_key, keys))


def _spell_key(key: str | int) -> str:
    """Return a key as it can stand in a line: long or unprintable ones are quoted and cut."""
    text = str(key)
    return text if text.isprintable() and 0 < len(text) <= 40 else _show(text)


def find_place(keys: Keys, document: Document) -> Place:
    """Return where a key, or else the nearest section around it, was written."""
    while keys not in document.places:
        keys = keys[:-1]
    return document.places[keys]


def _explain_unknown_key(keys: Keys) -> tuple[str, str]:
    """Return the message and hint for a key that no section has."""
    *section, key = map(_spell_key, keys)
    name = ".".join([*section, key])
    elsewhere = {"lora": NOT_IN_LORA, "training": NOT_IN_TRAINING}.get(
        section[0] if section else "", {}
    )
    if key in elsewhere:
        return f"{name} cannot be set", elsewhere[key]
    if key in RENAMED:
        return f"{name} is not a known key", f"it is called {RENAMED[key]}"
    sections = _list_sections()
    homes = [parent for parent, model in sections.items() if key in model.model_fields]
    if homes:
        return f"{name} is not a known key", f"{key} belongs in the section {homes[0]}"
    if section[:2] == ["data", "mix"]:
        known = Rows.model_fields
    elif section and section[0] in sections:
        known = sections[section[0]].model_fields
    else:
        known = Recipe.model_fields
    guess = find_nearest(key, known)
    if guess is None:
        return f"{name} is not a known key", "lora schema --markdown lists every key"
    return f"{name} is not a known key", f"did you mean {'.'.join([*section, guess])}?"


def _list_sections() -> dict[str, type[Section]]:
    """Return the recipe's sections by name."""
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        name: kind
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, Section)
    }


def _quote_text(keys: Keys, place: Place, details: Sequence[Any]) -> str | None:
    """Return the option that gives a value as the text that it was meant as, where YAML reads it as
    something else: `summarize: ` is a mapping, and 7 a number."""
    key, _, value = place.name.removeprefix("--set ").partition("=")
    if place.line or key != spell_keys(keys) or "string_type" not in [d["type"] for d in details]:
        return None
    if not isinstance(details[0]["input"], (dict, int, float)) or value.startswith("{"):
        return None
    return f"--set {quote(f'{key}={json.dumps(value, ensure_ascii=False)}')}"


def _suggest_value(keys: Keys, wrong: Any, details: Sequence[Any], document: Document) -> str:
    """Return a hint for a wrong value: the word that was meant, or the default."""
    expected = " ".join(str(detail.get("ctx", {}).get("expected", "")) for detail in details)
    words = re.findall(r"'([^']+)'", expected)
    if isinstance(wrong, str) and (guess := find_nearest(wrong, words)):
        return f"did you mean {guess}?"
    field = _find_field(keys)
    if isinstance(wrong, str) and field is not None and (meant := _reread(field, wrong)):
        return f"write {'.'.join(map(str, keys))}: {meant}"
    if field is None or field.is_required():
        return "lora schema --markdown describes every key"
    default = field.get_default(call_default_factory=True)
    if keys[0] == "preference":
        default = name_objective(document.data.get("objective")).defaults.get(
            str(keys[-1]), default
        )
    if isinstance(default, BaseModel):
        return "lora schema --markdown describes every key"
    if default is None:
        return "leave it out"
    return f"leave it out for its default, {_show(default)}"


WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""Words that YAML 1.1 and other tools take for true and false."""


def _reread(field: FieldInfo, wrong: str) -> str | None:
    """Return how to write a value that was given as text, where the text means one of the field's
    type: a number in quotes, `yes`."""
    meant: Any = WORDS.get(wrong.lower())
    if meant is None:
        try:
            meant = json.loads(wrong.lower())
        except ValueError:
            return None
    try:
        kind: Any = field.annotation
        made = TypeAdapter(kind).validate_python(meant, strict=True)
    except ValidationError:
        return None
    return json.dumps(made) if isinstance(made, (bool, int, float)) else None


def _find_field(keys: Keys) -> FieldInfo | None:
    """Return the field that `keys` lead to, or None."""
    kind: Any = Recipe
    field = None
    for key in keys:
        declares_fields = isinstance(kind, type) and issubclass(kind, BaseModel)
        field = kind.model_fields.get(str(key)) if declares_fields else None
        kind = field.annotation if field else None
    return field


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


def _describe_allowed(detail: Any) -> str:
    """Return what a refused value must be, to complete the sentence `… but must be`."""
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return str(context["expected"])
    if detail["type"] == "string_pattern_mismatch":
        return f"text matching {context['pattern']}"
    if detail["type"] in _KINDS:
        return _KINDS[detail["type"]]
    return detail["msg"].removeprefix("Input should be ").replace("Input should", "it should")


def _show(value: Any) -> str:
    """Return a value as YAML writes it, cut to 40 characters."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 40 else text[:37] + "…"
