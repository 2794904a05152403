"""Are a merged model's files the base with the adapter folded in? Weight by weight, in constant
memory.

Logits cannot tell in 16 bits: rounding every weight moves them about as far as one module of many
left unmerged. Here each tensor is merged again and set beside the one in the file, at any size of
model.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from lora_cli.common import RejectedError
from lora_cli.merge import streaming_plan
from lora_cli.merge.streaming import Plan, one_thread_each, together
from lora_cli.models import Adapter, Base, Tensors

# How far from the merge a tensor may lie, by the length of the adapter's change to it. PEFT's
# safe_merge in 16 bits, which rounds the change before adding it, comes to 0.11 where the change
# itself is mostly rounded away, and far less elsewhere; a module that was left unmerged, or merged
# twice, to 1, and one at half its strength to 0.5
OFF = 0.3


class Distance(NamedTuple):
    """How far a tensor of the file lies from the one merged anew."""

    unequal: int
    size: int
    off: float
    """Euclidean, over that of the adapter's change to the tensor; 0 where both are, and infinite
    where only that is."""


def compare_weights(adapter: Adapter, merged: Base) -> str | None:
    """How the files of a merged model, a folder or on the hub, differ from `adapter` merged anew.

    None where the adapter cannot be merged tensor by tensor. RejectedError naming a tensor that is
    not the merged one.
    """
    try:
        plan, _ = streaming_plan.make_plan(adapter, adapter.trained_dtype, adapter.quantization)
    except streaming_plan.Unstreamable:
        return None
    written = merged.tensors
    if written is None:
        return None
    missing = sorted(name for name in plan.parameters if name not in written.entries)
    if missing:
        raise RejectedError(f"{merged} lacks {missing[0]}, which {adapter.base} has", "merge again")

    def distances_of(names: list[str]) -> dict[str, Distance]:
        return {name: _measure_distance(plan, written, name, merged.dtype) for name in names}

    distances: dict[str, Distance] = {}
    with one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        for some in pool.map(distances_of, together(plan, plan.parameters)):
            distances |= some
    for name, distance in distances.items():
        if not distance.off <= OFF:
            how = (
                "is not the base's"
                if math.isinf(distance.off)
                else f"lies {distance.off:.0%} of the change off"
            )
            kept = (
                ", or was it merged with --base-weights original?" if adapter.quantization else ""
            )
            raise RejectedError(
                f"{name} in {merged} {how} where {adapter.folder} merges to", f"merge again{kept}"
            )
    unequal = [distance for distance in distances.values() if distance.unequal]
    share = sum(distance.unequal for distance in unequal) / sum(
        distance.size for distance in distances.values()
    )
    equal = len(distances) - len(unequal)
    return f"{equal} of {len(distances)} tensors equal, {share:.2%} of all weights differ"


def _measure_distance(plan: Plan, written: Tensors, name: str, dtype: torch.dtype) -> Distance:
    unequal, off, change, start = 0, 0.0, 0.0, 0
    with torch.inference_mode():
        for expected in plan.merged(name, dtype):
            stop = start + (len(expected) if expected.dim() else 1)
            given = written.rows(name, start, stop)
            before = plan.weights.base.rows(name, start, stop).to(expected.dtype)
            unequal += int((given != expected).sum())
            off += (given.double() - expected.double()).square().sum().item()
            change += (before.double() - expected.double()).square().sum().item()
            start = stop
    share = math.sqrt(off / change) if change else (math.inf if off else 0.0)
    return Distance(unequal, math.prod(plan.weights.base.entries[name].shape), share)
