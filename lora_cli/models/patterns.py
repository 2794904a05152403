"""Try the regular expressions of a recipe, or of a foreign adapter, before PEFT uses them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import LoraConfig

from lora_cli.common import UsageError, confined
from lora_cli.models import peft_matching

SECONDS = 2.0
"""Processor time that all expressions may take on all of a model's names: a busy machine is no
reason to refuse."""
MEMORY = 2**28
"""Bytes that they may take."""
LONGEST = 10_000
"""Characters of an expression."""
NAME = re.compile(r"[\w.-]+")
"""What is matched in time that grows with its length only: nothing in it repeats."""
_matcher = confined.Confined(Path(__file__).with_name("pattern_program.py"))


def refuse_slow_patterns(
    config: LoraConfig, names: Sequence[str], where: Callable[[str], str]
) -> None:
    """Raise UsageError for a regular expression of `config` that does not compile, or takes longer
    than SECONDS on these names, and for lists of more names than there are here.

    `where` says in which place a field was written.
    """
    _refuse_long_lists(config, max(len(names), 1000), where)
    asked = [each for each in peft_matching.walk_patterns(config) if not NAME.fullmatch(each[1])]
    for field, written, _ in asked:
        if len(written) > LONGEST:
            raise UsageError(
                f"{where(field)}: {_shorten(written)} has {len(written):,} characters",
                "give a list of names",
            )
    try:
        said = _matcher.run(
            confined.Budget(SECONDS, MEMORY, each=False),
            list(names),
            [pattern for _, _, pattern in asked],
        )
    except confined.Stopped as stopped:
        field, written, _ = asked[stopped.done]
        takes = f"over {SECONDS:g} s" if stopped.why == "time" else "too much memory"
        raise UsageError(
            f"{where(field)}: {_shorten(written)} takes {takes} to match {len(names)} names",
            "avoid a repeat within a repeat, such as (a+)+, or give a list of names",
        ) from None
    for (field, written, _), refused in zip(asked, said):
        if refused is not None:
            raise UsageError(
                f"{where(field)}: {_shorten(written)} is not a regular expression: {refused}",
                "lists take names",
            )


def _refuse_long_lists(config: LoraConfig, most: int, where: Callable[[str], str]) -> None:
    """Raise UsageError for a field with more items than the model has names, for each of which PEFT
    looks through the field."""
    for field in peft_matching.NAMING:
        given = getattr(config, field)
        if isinstance(given, (list, set, tuple, dict)) and len(given) > most:
            raise UsageError(
                f"{where(field)} has {len(given):,} items, and the model {most:,} modules at most",
                "leave out what names none of them",
            )


def _shorten(written: str) -> str:
    return repr(written if len(written) <= 80 else f"{written[:79]}…")
