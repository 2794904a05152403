"""Forecast what a recipe needs of a device's memory, item by item, before a weight is loaded.

`lora plan` shows the forecast, `auto` decides by it, and the out-of-memory message advises from it.
The figures are those of a rehearsed step (`rehearsal.py`) and of what surrounds it on the device.
On a CPU the C library's heap keeps more than is alive, and kernels take memory of their own: two
constants, measured by `scripts/bench_memory.py` over methods, checkpointing, packing and lengths.
On a GPU a fixed part is reserved for the context and the allocator's slack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
from peft import PeftModel
from transformers import PretrainedConfig

from lora_cli.data import prepare, selection
from lora_cli.models import Base
from lora_cli.plan import hardware
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.plan.live_bytes import ACTIVATIONS, BACKWARD, GRADIENTS, HEAD, ITEMS, Peaks
from lora_cli.plan.rehearsal import Batch, Rehearsal
from lora_cli.plan.weightless import Unforeseen, build_adapted
from lora_cli.recipe import Recipe
from lora_cli.speed import step_packing

HEAP = "allocator slack"
WORKSPACE = "kernel workspace"
MAPPED = "16-bit source of 4-bit weights"
RESERVE = "reserved for CUDA"
HEAP_KEEPS = 0.44
"""Measured: what glibc's heap keeps beside each byte that a step has alive and frees again."""
WORKSPACE_BYTES = 130 << 20
"""Measured: what a process grows by beside its tensors, above all in the loss head's kernels."""
RESERVE_BYTES = GIB
"""Assumed: CUDA's context and the allocator's slack."""
FREED = (GRADIENTS, ACTIVATIONS, HEAD, BACKWARD)
"""Items of a step whose memory is given back before the next one."""


class Need(NamedTuple):
    """Bytes by item at the moment when their sum is highest."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def __str__(self) -> str:
        largest = sorted(self.items.items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
        return f"{format_bytes(self.total)} ({listed})"


LONGEST = 1 << 20
"""Tokens of the longest row that is rehearsed: the time of a rehearsal grows with them, to seconds
at this length."""


def format_bytes(size: float) -> str:
    """`12.3 GiB`, or `123 MiB` below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):,.0f} MiB"


def largest_batch(recipe: Recipe, rows: prepare.Prepared | None = None) -> Batch:
    """Return the largest forward pass of a settled recipe.

    Without rows, all are taken to be as long as training.max_length allows, but no longer than
    LONGEST.
    """
    training = recipe.training
    size = training.per_device_train_batch_size
    if recipe.task_row.reads_pictures:
        return Batch(size, 1, training.gradient_accumulation_steps > 1)
    most = min(training.max_length, LONGEST)
    found = [min(limit.total, LONGEST) for limit in selection.list_limits(recipe)]
    if rows is not None and len(rows.rows):
        found = [
            int(prepare.find_lengths(rows.rows, column).max())
            for column in recipe.task_row.text_columns
        ]
    longest, targets = (*found, 0)[:2]
    waiting = training.gradient_accumulation_steps > 1
    if training.packing == "step":
        together = longest * size * training.gradient_accumulation_steps
        room = max(longest, find_packed_length(recipe))
        return Batch(1, min(together, room), waiting=together > room)
    if training.packing in (True, "dataset"):
        return Batch(1, size * most, waiting)
    if getattr(training, "padding_free", False):
        return Batch(1, size * longest, waiting)
    return Batch(size, longest, waiting, targets)


def find_packed_length(recipe: Recipe) -> int:
    """Return up to how many tokens rows of a step are joined: what the recipe says, or as on a
    CPU."""
    training = recipe.training
    if isinstance(training.packed_length, int):
        return training.packed_length
    return min(training.max_length, step_packing.SEQUENCE)


class Forecast:
    """What steps of a settled recipe need on a device. Raises Unforeseen."""

    def __init__(self, recipe: Recipe, adapted: PeftModel, device: Hardware) -> None:
        self.recipe = recipe
        self.device = device
        self.rehearsal = Rehearsal(recipe, adapted, device.kind)
        self.known: dict[Batch, Need] = {}
        resting = add_surroundings(self.rehearsal, self.rehearsal.resting, device)
        self.rest = sum(resting.values())
        """Bytes that any step needs: weights, adapters, the optimiser's state."""

    def need(self, batch: Batch) -> Need:
        """Bytes by item for a forward and backward pass of this shape."""
        if batch not in self.known:
            peaks = self.rehearsal.step(batch)
            self.known[batch] = Need(add_surroundings(self.rehearsal, peaks, self.device))
        return self.known[batch]

    def fits(self, batch: Batch) -> bool:
        return self.need(batch).total <= self.device.memory

    def largest(self, grown: Callable[[int], Batch], start: int, limit: int) -> int:
        """Return the largest n up to `limit` for which `grown(n)` fits; 0 if not even 1 does.

        Memory is about quadratic in n, so a few rehearsed steps suffice; where it is not, as it
        grows by stairs, the middle is tried. It is found exactly: were it near the largest only,
        more memory could offer less. Where all seems to fit, `limit` itself is tried next. Nothing
        is tried where what lives as long as the run has no room.
        """
        if self.rest > self.device.memory:
            return 0
        low, high, width = 0, limit + 1, 2 * limit
        guess = max(1, min(start, limit))
        tried: dict[int, int] = {}
        while low + 1 < high:
            tried[guess] = self.need(grown(guess)).total
            if tried[guess] <= self.device.memory:
                low = guess
            else:
                high = guess
            is_slow, width = 2 * (high - low) > width, high - low
            asked = _find_crossing(tried, self.device.memory)
            if is_slow and not asked >= high > limit:
                asked = math.isqrt(max(low, 1) * high)
            guess = min(max(asked, low + 1), high - 1)
        return low


def _find_crossing(tried: dict[int, int], limit: int) -> int:
    """Return where the parabola through the three tried points nearest the limit crosses the limit.

    With fewer points, twice the largest that fits or half the smallest that does not.
    """
    nearest = sorted(tried, key=lambda n: abs(tried[n] - limit))[:3]
    if len(nearest) == 3:
        curve = numpy.polyfit(nearest, [tried[n] - limit for n in nearest], 2)
        found = numpy.roots(curve)
        roots = [r.real for r in found if r.real > 0 and abs(r.imag) < 1e-3 * r.real]
        if roots:
            return math.floor(min(roots, key=lambda root: abs(root - nearest[0])))
    return max(tried) * 2 if tried[max(tried)] <= limit else min(tried) // 2


def add_surroundings(rehearsal: Rehearsal, peaks: Peaks, device: Hardware) -> dict[str, int]:
    """Return a rehearsed step's bytes with what surrounds them on the device.

    On a CPU glibc's heap keeps what it ever had, so the peak of the small storages is added to that
    of the large ones, whenever each was. The files of a checkpoint in the run's own type stay
    mapped beside the weights that were quantised from them.
    """
    if device.kind == "cuda":
        items = {name: peaks.all[name] for name in ITEMS if peaks.all[name]}
        return items | {RESERVE: RESERVE_BYTES}
    both = peaks.small + peaks.large
    items = {name: both[name] for name in ITEMS if both[name]}
    if rehearsal.quantised_from:
        items[MAPPED] = rehearsal.quantised_from
    kept = HEAP_KEEPS * sum(peaks.small[name] for name in FREED)
    return items | {HEAP: round(kept), WORKSPACE: WORKSPACE_BYTES}


def make_forecast(recipe: Recipe, config: PretrainedConfig, device: Hardware) -> Forecast:
    """Return a settled recipe's forecast from its base's configuration."""
    return Forecast(recipe, build_adapted(recipe, config), device)


def suggest_what_fits(recipe: Recipe, device: Hardware | None = None) -> str:
    """Return what a recipe that ran out of memory was expected to need, and what to `--set`
    instead."""
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    config = Base.of_recipe(recipe).config
    batch = largest_batch(recipe)
    try:
        plan = make_forecast(recipe, config, device)
        found = [f"it was expected to need {plan.need(batch)} of {device}"]
        for option, changed in _make_smaller(recipe):
            need = make_forecast(changed, config, device).need(largest_batch(changed))
            fits = "fits" if need.total <= device.memory else "does not fit either"
            found.append(f"--set {option} needs {format_bytes(need.total)}, which {fits}")
        length = plan.largest(lambda n: batch._replace(length=n), batch.length // 2, batch.length)
    except Unforeseen as error:
        return f"{error}; --set training.per_device_train_batch_size=1, or method=qlora"
    if 1 < length < batch.length and batch.rows == 1 and recipe.training.packing == "step":
        found.append(f"--set training.max_length={length} fits")
    return "; ".join(found)


def _make_smaller(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Options that make a recipe need less, each with the recipe it gives."""
    changes: list[tuple[str, Recipe]] = []
    shorter = min(recipe.training.max_length, step_packing.SEQUENCE)
    if recipe.training.packing == "step" and find_packed_length(recipe) > shorter:
        made = recipe.replace(recipe.trainer, {"training": {"packed_length": shorter}})
        changes.append((f"training.packed_length={shorter}", made))
    if not recipe.training.gradient_checkpointing:
        made = recipe.replace(recipe.trainer, {"training": {"gradient_checkpointing": True}})
        changes.append(("training.gradient_checkpointing=true", made))
    if recipe.training.per_device_train_batch_size > 1 and recipe.training.packing != "step":
        made = recipe.replace(recipe.trainer, {"training": {"per_device_train_batch_size": 1}})
        changes.append(("training.per_device_train_batch_size=1", made))
    if not (recipe.quantized or recipe.task_row.reads_pictures):
        method = {"lora": "qlora", "dora": "qdora"}[recipe.method]
        made = recipe.model_copy(
            update={"method": method, "quantization": settle_quantization(recipe)}
        )
        changes.append((f"method={method}", made))
    return changes


def settle_quantization(recipe: Recipe) -> Any:
    """Return the recipe's 4-bit storage, with the compute type that its `auto` becomes."""
    given = recipe.quantization
    if given.bnb_4bit_compute_dtype != "auto":
        return given
    return given.model_copy(update={"bnb_4bit_compute_dtype": recipe.model.dtype})
