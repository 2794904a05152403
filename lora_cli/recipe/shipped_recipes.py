"""The recipes that come with lora: found by name, listed, copied."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_cli.common import UsageError, files, find_nearest, quote, ui
from lora_cli.recipe import schema

FOLDER = Path(__file__).parent / "shipped"
SCHEMA = "schema.json"
"""What the first line of every shipped recipe points editors to, beside the recipe."""

NEITHER = "neither a file nor a shipped recipe"
"""What is said of a name that could be either."""


class ShippedRecipe(NamedTuple):
    """A recipe's name on the command line, and what it is for."""

    name: str
    purpose: str


def list_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe by name; its purpose is the file's first comment but the editors'."""
    return [ShippedRecipe(name, _read_purpose(get_file(name))) for name in _list_names()]


def _read_purpose(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and "yaml-language-server" not in line:
            return line.removeprefix("# ").rstrip(".:")
    raise AssertionError(f"{path} does not say what it is for")


def find_recipe(path: Path) -> Path:
    """Return the file that a recipe argument means: itself, or the shipped recipe whose name it is.

    UsageError for a bare word that is neither, with the nearest name, and for a path to a missing
    file that has a shipped recipe's name. Any other path is handed back as it is.
    """
    names = _list_names()
    if path.name in names and is_name(str(path)):
        return path if path.is_file() else get_file(path.name)
    if _is_there(path):
        return path
    if is_name(str(path)):
        _suggest_suffix(path)
        return get_file(path.name, NEITHER)
    if path.stem in names:
        hint = f"did you mean {path.stem}, the shipped recipe? lora recipes lists them"
        raise UsageError(f"{path} does not exist", hint)
    return path


def _suggest_suffix(path: Path) -> None:
    """Raise UsageError for a name that is that of a file here but for its suffix."""
    for whole in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if whole.is_file():
            raise UsageError(f"{path} does not exist", f"did you mean {quote(whole)}?")


def _is_there(path: Path) -> bool:
    """Is there anything of this name? True also where that cannot be told: reading it says why."""
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return True


def is_name(text: str) -> bool:
    """Can it be the name of a shipped recipe: one word, without folder or suffix?"""
    return Path(text).name == text and not Path(text).suffix


def get_file(name: str, otherwise: str = "not a shipped recipe") -> Path:
    """Return the file of the shipped recipe of this name.

    UsageError naming the nearest where there is none; `otherwise` is what it says of the name.
    """
    names = _list_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    nearest = find_nearest(name, names)
    hint = f"did you mean {nearest}? " if nearest else ""
    raise UsageError(f"{name} is {otherwise}", f"{hint}lora recipes lists them")


def _list_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def copy_recipe(name: str, target: Path | None = None) -> Path:
    """Copy a shipped recipe, byte for byte, to `target`, by default NAME.yaml; the copy's path.

    The schema that its first line names is written beside it, unless a file of that name is there.
    UsageError for a name that is none, a target that exists, or a folder of it that does not.
    """
    source = get_file(name)
    target = target or Path(source.name)
    free = files.find_free(target)
    another = f"lora recipes copy {quote(name)} {quote(free)} takes another name"
    files.write_new(target, source.read_text(encoding="utf-8"), another)
    _write_schema(target.with_name(SCHEMA))
    return target


def _write_schema(path: Path) -> None:
    """Write this version's schema; a file that is there is left, with a warning where it
    differs."""
    current = schema.make_json()
    if not path.exists():
        files.write_text(path, current)
        ui.say(f"{path} lets editors check and complete the recipe")
    elif not path.is_file() or path.read_bytes() != current.encode():
        ui.warn(
            f"{path} is not this version's schema; the recipe's first line points editors to it"
        )
        ui.say(f"lora schema > {quote(path)}  replaces it")
