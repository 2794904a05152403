"""The names that models are asked for by: NAME=PATH of the command line, else what a folder is
called."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lora_cli.common import UsageError, files, quote
from lora_cli.models import Base, names


def name_served(path: str, adapters: Sequence[str], base: str | None) -> dict[str, str]:
    """Return the folders of the adapters that are served with PATH, by their names: PATH is the
    first where it is one. Raises UsageError for what does not go with it, and for a name twice."""
    kind = names.classify(path)
    if kind == "gguf":
        if adapters or base:
            raise UsageError(
                f"{path} is a GGUF file, on which no adapter is laid",
                f"serve the base it was made from: lora serve BASE --adapter {quote('NAME=PATH')}",
            )
        return {}
    given = read_names(adapters)
    refuse_twice(name_model(path), given)
    if kind == "adapter":
        return {name_model(path): path, **given}
    if base:
        raise UsageError("--base is for an adapter", f"lora serve {quote(base)}")
    return given


def refuse_other_bases(bases: Mapping[str, Base]) -> None:
    """Raise UsageError where the bases of adapters, by the names of these, are not one."""
    first, *others = bases
    for name in others:
        if bases[name].name != bases[first].name:
            raise UsageError(
                f"{name} is an adapter on {bases[name]}, and {first} on {bases[first]}",
                "serve each by a server of its own",
            )


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
