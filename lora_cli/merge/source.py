"""Whether a 16-bit base is the one that a quantised base was made from, which it takes the place
of."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from lora_cli.common import LoraError, ui
from lora_cli.merge.streaming import limit_threads
from lora_cli.models import Adapter, Tensors, split_rows

# How far a quantised tensor may lie from the one it was made from, as a share of that one's length.
# NF4 of SmolLM2-135M lies at 0.09, FP4 at 0.13, FP8 at 0.03; unrelated weights at 1.4
OFF = 0.5


def refuse_other_source(adapter: Adapter) -> None:
    """Say how far the base lies from the quantised one in whose place it is, where that is at hand.

    Raise LoraError where it is another model: a tensor is farther than quantising puts it, or of
    another shape.
    """
    before, now = adapter.replaced, adapter.base
    if before is None or not before.is_readable():
        return
    stored, given = before.tensors, now.tensors
    assert stored is not None, "is_readable has looked"
    if given is None:
        return
    names = [name for name in stored.entries if name in given.entries]
    for name in names:
        if stored.entries[name].shape != given.entries[name].shape:
            raise _explain(adapter, f"{name} has another shape")
    with limit_threads() as workers, ThreadPoolExecutor(workers) as pool:
        offs = list(pool.map(lambda name: measure_distance(stored, given, name), names))
    off, name = max(zip(offs, names), default=(0.0, ""))
    if not off <= OFF:
        raise _explain(adapter, f"{name} is off by {off:.0%}")
    ui.say(f"  the weights of {before} lie up to {off:.1%} from those of {now} ({name})")


def measure_distance(stored: Tensors, given: Tensors, name: str) -> float:
    """Return the Euclidean distance of two tensors of one name, over the length of the one in
    `given`."""
    off = size = 0.0
    for start, stop in split_rows(given.entries[name].shape):
        wanted = given.rows(name, start, stop).double()
        off += (stored.rows(name, start, stop).double() - wanted).square().sum().item()
        size += wanted.square().sum().item()
    return math.sqrt(off / size) if size else (math.inf if off else 0.0)


def _explain(adapter: Adapter, what: str) -> LoraError:
    return LoraError(
        f"{adapter.base} is not the model that {adapter.replaced} was made from: {what}",
        f"leave --base out: {adapter.replaced} is dequantised then",
    )
