"""Try the regular expressions of a recipe, or of a foreign adapter, before PEFT uses them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from peft import LoraConfig

from lora_cli.common import UsageError
from lora_cli.models import peft_matching

SECONDS = 5.0
"""Processor time that all expressions may take on all of a model's names: a busy machine is no
reason to refuse."""

_MATCH_ALL = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # ends the process, also amid a match
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
    print(flush=True)
"""


def refuse_slow_patterns(
    config: LoraConfig, names: Sequence[str], where: Callable[[str], str]
) -> None:
    """Raise UsageError for a regular expression of `config` that does not compile, or takes longer
    than SECONDS on these names.

    `where` says in which place a field was written.
    """
    asked = list(peft_matching.walk_patterns(config))
    for field, written, pattern in asked:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(
                f"{where(field)}: {_shorten(written)} is not a regular expression: {error}",
                "lists take names",
            ) from None
    repeating = [each for each in asked if re.search(r"[*+{(]", each[1])]
    slow = _find_slow([pattern for _, _, pattern in repeating], names) if repeating else None
    if slow is not None:
        field, written, _ = repeating[slow]
        raise UsageError(
            f"{where(field)}: {_shorten(written)} takes over {SECONDS:g} s to match {len(names)} "
            "names",
            "avoid a repeat within a repeat, such as (a+)+, or give a list of names",
        )


def _find_slow(patterns: list[str], names: Sequence[str]) -> int | None:
    """Return the index of the expression still being matched when SECONDS are over; None if all
    were done in time. `re` cannot be interrupted, so a process of its own tries them."""
    given = json.dumps([patterns, list(names), SECONDS])
    command = [sys.executable, "-I", "-c", _MATCH_ALL]
    counted = hasattr(signal, "SIGVTALRM")
    try:
        done = subprocess.run(
            command,
            input=given,
            text=True,
            capture_output=True,
            timeout=None if counted else SECONDS,  # Windows counts no processor time: the clock
        )
    except subprocess.TimeoutExpired as error:
        return len((error.stdout or b"").splitlines())
    if counted and done.returncode == -signal.SIGVTALRM:
        return len(done.stdout.splitlines())
    done.check_returncode()
    return None


def _shorten(written: str) -> str:
    return repr(written if len(written) <= 80 else f"{written[:79]}…")
