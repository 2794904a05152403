"""The runs that `right` compares with: in float32, on this machine's processor. Its process does
not see the GPU."""

from __future__ import annotations

from functools import partial

from gpu_parts import right
from gpu_parts.part import Bench, Case
from gpu_parts.report import Column

TITLE = "The same in float32 on the processor"
COLUMNS: tuple[Column, ...] = ()


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return a case for each method."""
    return {name: Case(partial(right.train_reference, method=name), 40) for name in right.METHODS}
