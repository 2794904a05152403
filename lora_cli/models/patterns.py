"""Regular expressions of a recipe, or of an adapter made elsewhere: tried on a model's names before
PEFT uses them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft import LoraConfig

from lora_cli.common import UsageError

SECONDS = 5.0
"""Processor time that all expressions may take on all of a model's names: a busy machine is no
reason to refuse."""

_MATCH_ALL = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal ends the process, also amid a match
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
    print(flush=True)
"""


def refuse_slow_patterns(
    config: LoraConfig, names: Sequence[str], where: Callable[[str], str]
) -> None:
    """UsageError for a regular expression of `config` that is none, or takes longer than SECONDS on
    these names.

    `re` cannot be interrupted: they are tried in a process of their own. The expressions are those
    PEFT forms; `where` says in which place a field was written.
    """
    asked = list(_walk_patterns(config))
    for field, written, pattern in asked:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(
                f"{where(field)}: {_shorten(written)} is no regular expression: {error}",
                "lists take names",
            ) from None
    asked = [
        (field, written, pattern)
        for field, written, pattern in asked
        if re.search(r"[*+{(]", written)
    ]
    if not asked:
        return
    given = json.dumps([[pattern for _, _, pattern in asked], list(names), SECONDS])
    command = [sys.executable, "-I", "-c", _MATCH_ALL]
    done = subprocess.run(command, input=given, text=True, capture_output=True, check=False)
    if done.returncode == -signal.SIGVTALRM:
        field, written, _ = asked[len(done.stdout.splitlines())]
        raise UsageError(
            f"{where(field)}: {_shorten(written)} takes over {SECONDS:g} s to match {len(names)} "
            "names",
            "avoid a repeat within a repeat, such as (a+)+, or give a list of names",
        )
    done.check_returncode()


def pattern_of_key(written: str) -> str:
    """PEFT's regular expression for a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({written})$"


def as_list(value: Any) -> list[Any]:
    """PEFT's fields that are one value or several, as several."""
    return (
        [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]
    )


def _shorten(written: str) -> str:
    return repr(written if len(written) <= 80 else f"{written[:79]}…")


def _walk_patterns(config: LoraConfig) -> Iterator[tuple[str, str, str]]:
    """(field, what was written, the regular expression that PEFT makes of it)."""
    for field in ("target_modules", "exclude_modules"):
        written = getattr(config, field)
        if isinstance(written, str) and written != "all-linear":
            yield field, written, f"(?:{written})\\Z"
    for field in ("rank_pattern", "alpha_pattern"):
        for written in getattr(config, field) or {}:
            yield field, written, pattern_of_key(written)
    for name in config.modules_to_save or []:
        yield "modules_to_save", name, rf"(^|.*\.){name}($|\..*)"
    for pattern in as_list(config.layers_pattern):
        yield "layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
