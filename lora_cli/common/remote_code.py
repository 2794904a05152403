"""Let a model's own code run only with `--trust-remote-code`; no file can turn it on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_cli.common.errors import LoraError, UsageError

FLAG = "--trust-remote-code"
CODE_FROM = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Keys of a model's configuration whose value may name a repository of compiled kernels
(OWNER/NAME)."""

_allowed = False


def set_allowed(given: bool) -> None:
    """Set what the command line says; nothing else calls this."""
    global _allowed
    _allowed = given


def is_allowed() -> bool:
    """Return whether code from a model's repository may run in this process."""
    return _allowed


def refuse_disallowed_code(name: str, settings: Any) -> None:
    """Raise LoraError where the configuration `settings` of the model `name` asks for code that is
    not allowed.

    Code in another repository than the model's is refused even with the flag, because no commit
    pins it.
    """
    if not isinstance(settings, Mapping):
        raise LoraError(f"the config.json of {name} is not a mapping", "copy it again")
    elsewhere = sorted(
        {
            value.partition("--")[0]
            for value in _walk_classes(settings.get("auto_map"))
            if "--" in value
        }
    )
    if elsewhere and is_allowed():
        raise LoraError(
            f"{name} wants code from another repository, {elsewhere[0]}, and pins no commit of it",
            "download both into one folder, take its name out of auto_map in config.json, and "
            "give the folder",
        )
    if kernels := next(_walk_kernels(settings), None):
        require_allowed(
            f"{name} wants compiled kernels from {kernels}", "take them out of its config.json"
        )


def require_allowed(what: str, otherwise: str) -> None:
    """Raise UsageError unless code may run; it says `what` is wanted and what to do `otherwise`."""
    if not is_allowed():
        raise UsageError(
            f"{what}: that is other people's code, and it would run on this machine",
            f"{FLAG}, if you have read it; or {otherwise}",
        )


def is_repository(value: Any) -> bool:
    """Return whether a value for an implementation names a hub repository rather than one of
    transformers' own."""
    return (
        isinstance(value, str)
        and re.fullmatch(r"(?:paged\|)?[\w.-]+/[\w.-]+(?:[@:].*)?", value) is not None
    )


def _walk_classes(auto_map: Any) -> Iterator[str]:
    """Yield the classes that a configuration's auto_map names (a tokenizer's entry names two)."""
    for value in auto_map.values() if isinstance(auto_map, Mapping) else ():
        yield from (
            each
            for each in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(each, str)
        )


def _walk_kernels(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the kernel repositories that a configuration names, at any depth."""
    for key, value in settings.items():
        if key in CODE_FROM:
            given = value.values() if isinstance(value, Mapping) else [value]
            yield from (each for each in given if is_repository(each))
        elif isinstance(value, Mapping):
            yield from _walk_kernels(value)
