"""Compare a merged model's files with its base and adapter, weight by weight, in constant memory.

Logits do not show enough in 16 bits: rounding every weight moves them about as far as leaving one
module of many unmerged. Here each tensor is merged again and compared with the one in the file,
whatever the size of the model.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from lora_cli.common import RejectedError, spell_count
from lora_cli.merge import streaming_plan
from lora_cli.merge.streaming import Plan, group_by_layer, limit_threads
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
    """The Euclidean distance, over that of the adapter's change to the tensor; 0 where both are 0,
    infinite where only the change is 0."""


def compare_weights(
    adapter: Adapter, merged: Base, original: bool = False, repeated: bool = False
) -> str | None:
    """Return how the files of a merged model, a folder or on the hub, differ from `adapter` merged
    anew; `original`: into the base's own weights, though it was trained on them in 4 bits;
    `repeated`: the same arithmetic on the same machine wrote them, so that every bit must be equal.

    None where the adapter cannot be merged tensor by tensor. Raise RejectedError naming a tensor
    that is not the merged one.
    """
    try:
        stored = None if original else adapter.quantization
        plan, _ = streaming_plan.make_plan(adapter, adapter.trained_dtype, stored)
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
    with limit_threads() as workers, ThreadPoolExecutor(workers) as pool:
        for some in pool.map(distances_of, group_by_layer(plan, plan.parameters)):
            distances |= some
    for name, distance in distances.items():
        if not distance.off <= OFF or repeated and distance.unequal:
            raise _explain_distance(name, distance, adapter, merged)
    all_weights = sum(distance.size for distance in distances.values())
    share = sum(distance.unequal for distance in distances.values()) / all_weights
    equal = sum(not distance.unequal for distance in distances.values())
    tensors = spell_count(len(distances), "tensor")
    return f"{equal} of {tensors} equal, {share:.2%} of all weights differ"


def _explain_distance(
    name: str, distance: Distance, adapter: Adapter, merged: Base
) -> RejectedError:
    """Return the error that says how far off one tensor is."""
    how = (
        "differs from the base, though the adapter does not change it"
        if math.isinf(distance.off)
        else f"is off by {distance.off:.1%} of the adapter's change, in {distance.unequal} of its "
        f"{distance.size} weights"
    )
    kept = ", or was it merged with --base-weights original?" if adapter.quantization else ""
    return RejectedError(
        f"{name} in {merged} {how} (compared with {adapter.folder} merged again)",
        f"merge again{kept}",
    )


def _measure_distance(plan: Plan, written: Tensors, name: str, dtype: torch.dtype) -> Distance:
    """Return the distance of one tensor of the file, of type `dtype`, from the same tensor merged
    by `plan`."""
    unequal = start = 0
    off = change = 0.0
    with torch.inference_mode():
        for expected in plan.merge_tensor(name, dtype):
            stop = start + (len(expected) if expected.dim() else 1)
            given = written.rows(name, start, stop)
            read = plan.weights.read_before(name, start, stop)
            # a head is not in the base's files, or of another size there
            before = torch.zeros_like(expected) if read is None else read.to(expected.dtype)
            unequal += int((given != expected).sum())
            off += (given.double() - expected.double()).square().sum().item()
            change += (before.double() - expected.double()).square().sum().item()
            start = stop
    share = math.sqrt(off / change) if change else (math.inf if off else 0.0)
    return Distance(unequal, math.prod(plan.weights.find_entry(name).shape), share)
