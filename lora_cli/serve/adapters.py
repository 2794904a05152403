"""The names that models are asked for by: NAME=PATH of the command line, else what a folder is
called."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lora_cli.common import UsageError, files, quote
from lora_cli.models import names


def read_names(adapters: Sequence[str]) -> dict[str, str]:
    """Return the folders of adapters, given as NAME=PATH, by their names. Raises UsageError."""
    found: dict[str, str] = {}
    for each in adapters:
        name, equals, path = each.partition("=")
        if not equals or not name or not path:
            raise UsageError(
                f"--adapter {each}: it is NAME=PATH", "--adapter mine=runs/mine/adapter"
            )
        if names.classify(path) != "adapter":
            raise UsageError(f"--adapter {name}: {path} is not an adapter", f"ls {quote(path)}")
        refuse_twice(name, found)
        found[name] = path
    return found


def refuse_twice(name: str, others: Collection[str]) -> None:
    """Raise UsageError where another model has the name."""
    if name in others:
        raise UsageError(f"two models are called {name}", "--adapter OTHER_NAME=PATH")


def name_model(path: str) -> str:
    """Return what a model is called: its folder's name, its run's, or that on the hub."""
    return files.name_artefact(Path(path)) if Path(path).exists() else path
