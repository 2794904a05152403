"""What a recipe argument is that is no recipe: rows, a model, a run's folder, a name on the hub;
and what to type then."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from lora_cli.common import UsageError, plain_files, quote

ROWS = {".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz"}
"""Endings of files that hold rows and never a recipe."""
MODELS = {".safetensors", ".bin", ".pt", ".pth", ".onnx"}
RECIPES = (".yaml", ".yml")
BEGINS = re.compile(rb"^(?:model|extends)\s*:", re.M)
"""What a recipe has, and other programs' YAML seldom."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FOLDERS = (
    ("adapter_config.json", "an adapter, not a recipe", "in a recipe: model: {{adapter: {path}}}"),
    ("config.json", "a model, not a recipe", "lora init ROWS --model {path} writes a recipe"),
)
"""What a folder is by a file in it, and what to do with such a one."""


def refuse_others(path: Path) -> None:
    """Raise UsageError where the path cannot be a recipe, saying what it is and what to type. A
    file that may be one passes, and reading it tells."""
    if path.is_dir():
        raise _name_folder(path)
    if path.suffix.lower() in ROWS and path.is_file():
        raise UsageError(f"{path} holds rows, not a recipe", f"lora init {quote(path)}")
    is_gguf = plain_files.is_gguf(path)
    if (is_gguf or path.suffix.lower() in MODELS) and path.is_file():
        model = path if is_gguf else path.parent
        hint = f"lora init ROWS --model {quote(model)} writes a recipe"
        raise UsageError(f"{path} is a model's file, not a recipe", hint)
    if _may_be_on_hub(path):
        raise UsageError(
            f"{path} is not here",
            f"if it is a model on the hub: lora init ROWS --model {quote(path)} writes a recipe",
        )


def list_recipes_in(folder: Path) -> list[Path]:
    """Return the files of a folder that seem to be recipes, by name; none where it cannot be
    read."""
    found = []
    with suppress(OSError):
        for each in sorted(folder.iterdir()):
            if each.suffix in RECIPES and each.is_file():
                with suppress(OSError), each.open("rb") as file:
                    found += [each] * bool(BEGINS.search(file.read(LOOKED_AT)))
    return found


LOOKED_AT = 2**14
"""Bytes of a file in which that stands, if anywhere."""


def _may_be_on_hub(path: Path) -> bool:
    """Is it OWNER/NAME, and no file that is missing in a folder that is there?"""
    named = HUB_NAME.fullmatch(str(path)) and path.suffix not in RECIPES
    return bool(named) and not path.parent.exists()


def _name_folder(folder: Path) -> UsageError:
    """Return the error for a folder: by what is in it."""
    if (folder / "record.json").is_file() and (folder / "recipe.yaml").is_file():
        return UsageError(
            f"{folder} is the folder of a run, not a recipe",
            f"{quote(folder / 'recipe.yaml')} is the recipe; with --resume it goes on",
        )
    for file, what, hint in FOLDERS:
        if (folder / file).is_file():
            return UsageError(f"{folder} is {what}", hint.format(path=quote(folder)))
    if recipes := list_recipes_in(folder):
        return UsageError(
            f"{folder} is a folder, not a recipe", f"did you mean {quote(recipes[0])}?"
        )
    with suppress(OSError):
        if any(each.suffix in ROWS for each in folder.iterdir()):
            return UsageError(f"{folder} holds rows, not a recipe", f"lora init {quote(folder)}")
    return UsageError(f"{folder} is a folder, not a recipe", f"ls {quote(folder)}")
