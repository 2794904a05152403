"""What typer says of a wrong command line, with the line to type instead."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli.common import UsageError, find_nearest, quote, quote_words

MEANT = {
    "help": "--help",
    "version": "--version",
    "info": "doctor",
    **dict.fromkeys(("clean", "prune", "clear", "gc"), "cache"),
    **dict.fromkeys(("finetune", "fine-tune", "tune", "fit", "run", "sft", "start"), "train"),
    **dict.fromkeys(("continue", "resume"), "train"),
    **dict.fromkeys(("infer", "inference", "ask", "complete"), "generate"),
    **dict.fromkeys(("quantize", "quantise", "gguf", "convert-gguf"), "export-gguf"),
    **dict.fromkeys(("upload", "publish", "share"), "push"),
    **dict.fromkeys(("test", "score", "benchmark", "bench"), "evaluate"),
    **dict.fromkeys(("fuse", "bake", "merge-and-unload"), "merge"),
    **dict.fromkeys(("validate", "lint", "dry-run", "preprocess"), "check"),
    **dict.fromkeys(("list", "ls", "history"), "runs"),
    **dict.fromkeys(("configs", "examples", "templates"), "recipes"),
    **dict.fromkeys(("estimate", "memory", "vram"), "plan"),
    "onnx": "export-onnx",
    "classify": "predict",
}
"""What other programs call a verb of ours, and what newcomers have typed."""


def explain(error: Any) -> UsageError:
    """Return the error for what typer refuses (a click UsageError), with the line to type."""
    context = error.ctx
    path = context.command_path if context else "lora"
    message = error.format_message()
    if wrong := re.match(r"No such command '([^']*)'\.", message):
        return _name_verb(wrong[1], path, list(context.command.commands))
    if message.startswith("Missing argument 'RECIPE"):
        return UsageError(f"{path} needs a recipe", suggest_recipe(path))
    if unread := re.search(r"path '(.*)' is not readable", message):
        return UsageError(f"{unread[1]} may not be read", f"ls -ld {quote(unread[1])}")
    if message.startswith("No such option") and (line := _spell_paths()):
        return UsageError(message, line)
    return UsageError(message, f"{path} --help")


def _spell_paths() -> str | None:
    """Return the line with files whose names begin with a dash as paths; None where it has none."""
    words = sys.argv[1:]
    spelt = [
        f"./{word}" if word.startswith("-") and Path(word).exists() else word for word in words
    ]
    return f"lora {quote_words(spelt)}" if spelt != words else None


def _name_verb(word: str, path: str, known: list[str]) -> UsageError:
    """Return the error for a verb that there is not: the whole line with the one that was meant,
    where that can be told."""
    meant = MEANT.get(word.lower()) if path == "lora" else None
    meant = meant or find_nearest(word.lower(), known)
    words = sys.argv[1:]
    if meant is None or word not in words:
        return UsageError(f"{path} has no command {word}", f"{path} --help lists them")
    rest = [] if meant.startswith("-") else words[words.index(word) + 1 :]
    line = " ".join([path, meant, *([quote_words(rest)] if rest else [])])
    return UsageError(f"{path} has no command {word}", f"did you mean {line}?")


def suggest_recipe(path: str = "lora train") -> str:
    """Return what to type in place of a verb without its recipe, or of `lora` alone, by what lies
    in this folder."""
    from lora_cli.recipe import list_recipes_in

    if recipes := list_recipes_in(Path()):
        return f"{path} {quote(recipes[0])}"
    with suppress(OSError):  # the folder is gone, or not to be read
        for each in sorted(Path().iterdir()):
            if each.suffix in (".jsonl", ".csv", ".tsv", ".parquet") and each.is_file():
                return f"lora init {quote(each)}"
    return "lora recipes"
