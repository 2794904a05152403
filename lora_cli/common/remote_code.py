"""Code that comes with a model: run only if the command line says so (`--trust-remote-code`), never
as a file says."""

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
"""Keys of a model's configuration whose value may name a repository of compiled kernels:
OWNER/NAME."""

_allowed = False


def set_allowed(given: bool) -> None:
    """What the command line says; nothing else calls this."""
    global _allowed
    _allowed = given


def is_allowed() -> bool:
    """Whether code from a model's repository may run in this process."""
    return _allowed


def refuse_disallowed_code(name: str, settings: Any) -> None:
    """LoraError where the configuration `settings` of the model `name` wants code to run that is
    not allowed.

    Code in another repository than the model's is refused with the flag too: no commit pins it.
    """
    if not isinstance(settings, Mapping):
        raise LoraError(f"the config.json of {name} is no mapping", "copy it again")
    elsewhere = sorted(
        {
            value.partition("--")[0]
            for value in _walk_classes(settings.get("auto_map"))
            if "--" in value
        }
    )
    if elsewhere and is_allowed():
        raise LoraError(
            f"{name} wants code of another repository, {elsewhere[0]}, of which it pins no commit",
            "download both into one folder, take its name out of auto_map in config.json, and "
            "give the folder",
        )
    if kernels := next(_walk_kernels(settings), None):
        require_allowed(
            f"{name} wants compiled kernels of {kernels}", "take them out of its config.json"
        )


def require_allowed(what: str, otherwise: str) -> None:
    """UsageError saying `what` is wanted, and what to do `otherwise`, unless code may run."""
    if not is_allowed():
        raise UsageError(
            f"{what}: code of others, which would run here",
            f"{FLAG}, if you have read it; or {otherwise}",
        )


def is_repository(value: Any) -> bool:
    """Whether a value for an implementation names a repository on the hub rather than one of
    transformers' own."""
    return (
        isinstance(value, str)
        and re.fullmatch(r"(?:paged\|)?[\w.-]+/[\w.-]+(?:[@:].*)?", value) is not None
    )


def _walk_classes(auto_map: Any) -> Iterator[str]:
    """The classes that a configuration's auto_map names; of a tokenizer two."""
    for value in auto_map.values() if isinstance(auto_map, Mapping) else ():
        yield from (
            each
            for each in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(each, str)
        )


def _walk_kernels(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key in CODE_FROM:
            given = value.values() if isinstance(value, Mapping) else [value]
            yield from (each for each in given if is_repository(each))
        elif isinstance(value, Mapping):
            yield from _walk_kernels(value)
