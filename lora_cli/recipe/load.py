"""Load a recipe: its YAML, what it extends and `--set` become one `Recipe`, or one error listing
every problem."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_cli.common import UsageError, join_errors, privacy, quote
from lora_cli.recipe import messages, not_recipes, shipped_recipes, strict_yaml
from lora_cli.recipe.contradictions import list_contradictions
from lora_cli.recipe.keys import Recipe
from lora_cli.recipe.strict_yaml import Document, Keys, Place
from lora_cli.recipe.tasks import name_objective


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and `section.key=value` overrides.

    `path` may be the name of a shipped recipe. Raise UsageError listing every problem, each with
    its line and a fix.
    """
    path = shipped_recipes.find_recipe(path)
    not_recipes.refuse_others(path)
    return build_recipe(_read_chain(path, ()), path, overrides)


def build_recipe(document: Document, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a parsed file, `path`, and overrides of its values; UsageError as by
    `load_recipe`."""
    document = override_values(document, path, overrides)
    if not document.data:
        raise UsageError(f"{path}: a recipe has sections such as model: and data:", "lora schema")
    recipe, problems = _make(document, path)
    if recipe is None:
        raise join_errors(f"in {path}", problems)
    return recipe


def list_problems(text: str, path: Path) -> list[tuple[str, str | None]]:
    """Return what is wrong with the text of a recipe that would lie at `path` and extends nothing,
    each as (message, hint), where the message begins with `path:line`, or with a key that the text
    leaves to its default."""
    document = strict_yaml.parse(text, str(path))
    try:
        return _make(document, path)[1]
    except UsageError as error:
        return [(error.message, error.hint)]


def _make(document: Document, path: Path) -> tuple[Recipe | None, list[tuple[str, str | None]]]:
    """Return the recipe that a document says, or None with the problems that it has."""
    document.data.setdefault("output_dir", f"runs/{path.stem}")
    _refuse_secret(document)
    document.data.pop("extends", None)
    _expand_home(document.data)
    model = document.data.get("model")
    if isinstance(model, dict) and model.get("adapter") is not None:
        model.setdefault("name_or_path", "auto")
    _fill_preference(document.data)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        return None, list(islice(messages.list_problems(error, document), MOST_SAID))
    recipe._places = document.places
    problems = list(list_contradictions(recipe))
    return (None if problems else recipe), problems


def _fill_preference(data: dict[str, Any]) -> None:
    """Add what the recipe's objective takes for keys of `preference:` that are not given."""
    objective, given = name_objective(data.get("objective")), data.get("preference", {})
    if objective.compares and isinstance(given, dict):
        data["preference"] = objective.defaults | given


def override_values(document: Document, path: Path, overrides: Sequence[str]) -> Document:
    """Return a parsed file, `path`, with `section.key=value` laid over it."""
    if not isinstance(document.data, dict):
        raise UsageError(f"{path}: a recipe has sections such as model: and data:", "lora schema")
    for text in overrides:
        override = _parse_override(text)
        if "extends" in override.data:
            raise UsageError(
                f"--set {text}: extends belongs in the file", "--set overrides other values"
            )
        document = _merge(document, override)
    return document


MOST_SAID = 1000
"""Problems of a recipe that are looked for: finding what each key was meant to be takes time."""
HOME_PATHS = {
    "model": ("name_or_path", "adapter", "chat_template"),
    "data": ("path", "eval_path"),
    "": ("output_dir",),
}
"""Keys whose value may be a path, by section. In them `~/` is the user's home folder, which
otherwise only a shell expands."""


def _refuse_secret(document: Document) -> None:
    if held := privacy.find_held_secret(document.data):
        keys, what = held
        is_data = keys[0] == "data" and what.endswith("an address")
        raise UsageError(
            f"{messages.find_place(keys, document)}: {messages.spell_keys(keys)} holds {what}, and "
            "would be copied into the run's folder",
            "curl -fLo rows.jsonl 'ADDRESS', and name that file: such an address expires"
            if is_data
            else "take it out: the libraries read it from the environment",
        )


def _expand_home(data: dict[str, Any]) -> None:
    """Replace `~/` in the paths of the recipe's data, in place."""
    sections = [(data.get(name) if name else data, keys) for name, keys in HOME_PATHS.items()]
    mix = data["data"].get("mix") if isinstance(data.get("data"), dict) else None
    sections += [(rows, ("path",)) for rows in (mix if isinstance(mix, list) else [])]
    for section, keys in sections:
        if isinstance(section, dict):
            section |= {key: _expand(section[key]) for key in keys if key in section}


def _expand(value: Any) -> Any:
    """Return a path, or a list of them, with `~/` expanded; anything else unchanged."""
    if isinstance(value, list):
        return [_expand(each) for each in value]
    return privacy.expand_home(value) if isinstance(value, str) else value


def _read_chain(path: Path, above: tuple[Path, ...]) -> Document:
    """Return the file merged over the recipe it extends, which is merged over its own parent, and
    so on."""
    document = strict_yaml.read(path)
    parent = document.data.get("extends") if isinstance(document.data, dict) else None
    if parent is None:
        return document
    place = document.places[("extends",)]
    if not isinstance(parent, str):
        raise UsageError(f"{place}: extends must be the path of one recipe", "extends: base.yaml")
    base = _find_extended(path, parent, place)
    if base.resolve() in [file.resolve() for file in (*above, path)]:
        circle = " -> ".join(map(str, (*above, path, base)))
        raise UsageError(f"{place}: extends goes in a circle: {circle}", "remove one")
    if not base.is_file():
        why = "is not a file" if base.exists() else "does not exist"
        raise UsageError(
            f"{place}: {base}, which it extends, {why}", "the path is relative to this file"
        )
    return _merge(_read_chain(base, (*above, path)), document)


def _find_extended(path: Path, parent: str, place: Place) -> Path:
    """Return the file that `extends: parent` in `path` means: one beside it, or a shipped recipe by
    name."""
    base = path.parent / parent
    if not shipped_recipes.is_name(parent) or base.exists():
        return base
    try:
        return shipped_recipes.get_file(parent, shipped_recipes.NEITHER)
    except UsageError as error:
        raise UsageError(f"{place}: extends: {error.message}", error.hint) from None


def _merge(below: Document, above: Document) -> Document:
    """Lay `above` over `below`: sections are joined, other values (lists too) are replaced."""
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


def _parse_override(text: str) -> Document:
    """Return `section.key=value` as a document whose places are the option itself."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(
            f"--set {text}: expected section.key=value", "--set training.learning_rate=1e-4"
        )
    if not value.strip():
        none = f"--set {quote(f'{key}=null')} for none"
        raise UsageError(f"--set {text}: the value is missing", none)
    document = strict_yaml.parse(value, f"--set {text}", first_line=0)
    data, keys = document.data if document.places else value, tuple(key.split("."))
    places: dict[Keys, Place] = {(*keys, *inner): place for inner, place in document.places.items()}
    for depth in range(1, len(keys) + 1):
        places[keys[:depth]] = Place(f"--set {text}", 0)
    for part in reversed(keys):
        data = {part: data}
    return Document(data, places)
