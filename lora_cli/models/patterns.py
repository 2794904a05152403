"""Regular expressions of a recipe, or of an adapter made elsewhere: tried on a model's names before
PEFT uses them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from peft import LoraConfig

from lora_cli.common import UsageError
from lora_cli.models import peft_matching

SECONDS = 5.0
"""How long all expressions may take on all of a model's names."""

_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
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
    asked = list(peft_matching.walk_patterns(config))
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
    given = json.dumps([[pattern for _, _, pattern in asked], list(names)])
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _MATCH_ALL],
            input=given,
            text=True,
            capture_output=True,
            check=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        field, written, _ = asked[len((error.stdout or b"").splitlines())]
        raise UsageError(
            f"{where(field)}: {_shorten(written)} takes over {SECONDS:g} s to match {len(names)} "
            "names",
            "avoid a repeat within a repeat, such as (a+)+, or give a list of names",
        ) from None


def _shorten(written: str) -> str:
    return repr(written if len(written) <= 80 else f"{written[:79]}…")
