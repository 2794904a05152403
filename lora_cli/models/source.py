"""Whether a 16-bit base is the one that a quantised base was made from, which it takes the place
of."""

from __future__ import annotations

import math
from functools import cache

from lora_cli.common import LoraError, ui
from lora_cli.models.base import Base
from lora_cli.models.tensors import Tensors, split_rows

# How far a quantised tensor may lie from the one it was made from, as a share of that one's length.
# NF4 of SmolLM2-135M lies at up to 0.10; unrelated weights at 1.4
OFF = 0.5


@cache
def refuse_other_source(before: Base, now: Base) -> None:
    """Say, once, how far `now` lies from the quantised base `before` in whose place it is; warn
    where that is not here to be compared.

    Raise LoraError where it is another model: a tensor is farther than quantising puts it, or of
    another shape.
    """
    stored, given = before.tensors if before.is_readable() else None, now.tensors
    if stored is None or given is None:
        ui.warn(f"{now} is not compared with {before}, in whose place it is: that cannot be read")
        return
    off, farthest = 0.0, ""
    for name in stored.entries.keys() & given.entries.keys():
        if stored.entries[name].shape != given.entries[name].shape:
            raise _explain(before, now, f"{name} has another shape")
        off, farthest = max((off, farthest), (measure_distance(stored, given, name), name))
    if not off <= OFF:
        raise _explain(before, now, f"{farthest} is off by {off:.0%}")
    ui.say(f"  the weights of {before} lie up to {off:.1%} from those of {now} ({farthest})")


def measure_distance(stored: Tensors, given: Tensors, name: str) -> float:
    """Return the Euclidean distance of two tensors of one name, over the length of the one in
    `given`."""
    off = size = 0.0
    for start, stop in split_rows(given.entries[name].shape):
        wanted = given.rows(name, start, stop).double()
        off += (stored.rows(name, start, stop).double() - wanted).square().sum().item()
        size += wanted.square().sum().item()
    return math.sqrt(off / size) if size else (math.inf if off else 0.0)


def _explain(before: Base, now: Base, what: str) -> LoraError:
    return LoraError(
        f"{now} is not the model that {before} was made from: {what}",
        f"leave --base out: {before} is dequantised then",
    )
