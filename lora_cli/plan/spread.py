"""What several processes that train together need and lose: `lora plan --nproc N`.

With DDP each has the whole base and the adapter's gradients are summed once a step; sharded, each
has a part, and gathers the layers of a pass forward and again backward. What they lose is the time
in which those with fewer tokens wait for the one with most: a step's rows are dealt by their
lengths (`distributed/shares.py`), which is played through here on the rows themselves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from lora_cli.common import LoraError, spell_count
from lora_cli.distributed import shares
from lora_cli.models import find_statistics, host_blocks
from lora_cli.plan.hardware import GIB
from lora_cli.plan.live_bytes import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS
from lora_cli.recipe import Recipe

STEPS = 100
"""Steps that are dealt to find what uneven shares cost, or fewer where they are large."""
MOST_ROWS = 200_000
"""Rows that are dealt in all for that."""
OTHERS = (8, 64, 512)
"""Numbers of processes that are foreseen beside the one that is asked for."""
MASTER = 4
"""Bytes of a gradient: adapters are trained in float32."""
GATHERED = 2
"""Decoder layers that FSDP has whole at a time: one is computed, the next is on its way."""
LIVE = 1_000_000_000
"""Numbers that DeepSpeed keeps gathered at most, its default."""


class Parts(NamedTuple):
    """What one process needs alone, and what of it is divided."""

    items: Mapping[str, int]
    """Bytes by item at the peak of a step."""
    divided: tuple[str, ...] = ()
    """Items of which each process has a part; none where each has the whole base."""
    gathered: int = 0
    """Bytes of weights that each has whole for a while beside its part."""
    copies: int = 1
    """Of the base, among all processes."""
    arriving: int | None = None
    """Bytes of weights that each has whole beside its part while the base is loaded; None where
    what is cut off makes room for the parts."""

    def measure(self, processes: int) -> int:
        """Return what each of so many processes needs."""
        total, shards = sum(self.items.values()), max(1, processes // self.copies)
        if shards == 1 or not self.divided:
            return total
        divided = sum(self.items.get(name, 0) for name in self.divided)
        loading = weights = self.items[WEIGHTS]
        if self.arriving is not None:
            loading = weights // shards + self.arriving
        return max(total - divided + divided // shards + self.gathered, loading)

    def count_gathered(self, processes: int) -> int:
        """Return the bytes that each process gets of the others for a pass, there and back."""
        shards = max(1, processes // self.copies)
        return round(2 * (shards - 1) / shards * self.items[WEIGHTS]) if self.divided else 0


def take_apart(recipe: Recipe, items: Mapping[str, int], adapted: PeftModel) -> Parts:
    """Return the parts of what one process of a settled recipe needs, as its strategy has them;
    `adapted` may be without weights."""
    if not recipe.distributed.shards:
        return Parts(items)
    weights, base = items[WEIGHTS], adapted.get_base_model()
    outside, layers = host_blocks.measure_outside(base), len(host_blocks.find_blocks(base))
    inside = max(0, weights - outside)
    waits = host_blocks.suit(recipe, base)
    arriving = outside + inside // max(1, layers) if waits else None
    if recipe.distributed.strategy == "deepspeed-zero3":
        size = getattr(torch, recipe.model.dtype).itemsize
        return Parts(items, (WEIGHTS,), min(weights, LIVE * size), arriving=arriving)
    gathered = outside + GATHERED * inside // max(1, layers)
    arriving = weights if arriving is None else arriving  # accelerate keeps it until all is sharded
    divided = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER)
    return Parts(items, divided, gathered, recipe.distributed.replicas, arriving)


class Spread(NamedTuple):
    """What so many processes need and lose."""

    processes: int
    rows: float
    """Of a step, for each."""
    memory: int
    """Bytes that each needs at most: at the peak of a step, or to load the base."""
    sent: int
    """Bytes that each sends and gets for a step's gradients."""
    gathered: int
    """Bytes of weights that each gets for a pass; 0 where each has them all."""
    idle: float | None
    """The share of the processes' time that is lost to uneven shares; None without rows, and where
    a step has fewer rows than processes."""


def refuse_misfit(recipe: Recipe, processes: int) -> None:
    """Raise LoraError where a step has fewer rows than there are processes, so that some would
    train on nothing, and where the copies of a sharded base do not divide them."""
    copies = recipe.distributed.replicas
    asks = processes > 1 and copies > 1 and recipe.distributed.shards
    if asks and (processes % copies or processes == copies):
        raise LoraError(
            f"distributed.replicas: {copies} copies cannot be sharded over {processes} processes, "
            "each over as many",
            f"--nproc {max(2, processes // copies) * copies}, or distributed: {{strategy: ddp}}",
        )
    step = recipe.count_step_rows()
    if step < processes:
        raise LoraError(
            f"a step has {spell_count(step, 'row')}, and {processes} processes: some would have "
            "none to train on",
            f"--nproc {step}, or --set training.per_device_train_batch_size={processes}",
        )


def refuse_statistics(network: nn.Module, processes: int) -> None:
    """Raise LoraError where modules of a base take means and variances of the rows that one process
    has: several would train another run than one."""
    kept = find_statistics(network) if processes > 1 else []
    if kept:
        raise LoraError(
            f"{spell_count(len(kept), 'module')} of the base, such as {kept[0]}, take means and "
            "variances of the "
            "rows that are together in one process: several processes would train another run",
            "--nproc 1",
        )


def foresee(
    recipe: Recipe, processes: int, trained: int, parts: Parts, lengths: Sequence[int] | None
) -> list[Spread]:
    """Return what so many processes, and OTHERS, need and lose; `trained` counts the adapter's
    numbers, `lengths` are those of the rows. LoraError as `refuse_misfit` raises it."""
    refuse_misfit(recipe, processes)
    step = recipe.count_step_rows()
    return [
        Spread(
            number,
            step / number,
            parts.measure(number),
            round(2 * (number - 1) / number * MASTER * trained),
            parts.count_gathered(number),
            measure_idle(recipe, number, lengths) if lengths and number <= step else None,
        )
        for number in sorted({processes, *OTHERS})
    ]


def measure_idle(recipe: Recipe, processes: int, lengths: Sequence[int]) -> float:
    """Return the share of the processes' time that is lost as some have more tokens than others,
    the mean of steps of rows drawn at random from `lengths`."""
    step, padded = recipe.count_step_rows(), recipe.training.packing != "step"
    chance, losses = random.Random(0), []
    for _ in range(max(1, min(STEPS, MOST_ROWS // step))):
        drawn = chance.choices(lengths, k=step)
        dealt = [
            [drawn[place] for place in share] for share in shares.deal(drawn, processes, padded)
        ]
        work = [_measure_work(share, padded) for share in dealt]
        losses.append(1 - sum(work) / (processes * max(work)))
    return sum(losses) / len(losses)


def _measure_work(share: Sequence[int], padded: bool) -> int:
    """Return how many tokens a share takes through the model; padded rows are all as long as the
    longest."""
    return (max(share) * len(share) if padded else sum(share)) if share else 0


def format_lines(found: Sequence[Spread]) -> list[list[str]]:
    """Return the cells of a table: a row for each number of processes."""
    return [
        [
            str(each.processes),
            f"{each.rows:.3g}",
            f"{each.memory / GIB:.2f} GiB",
            f"{each.sent / 1e6:,.1f} MB",
            f"{each.gathered / 1e6:,.1f} MB" if each.gathered else "-",
            "-" if each.idle is None else f"{each.idle:.1%}",
        ]
        for each in found
    ]


HEADER = (
    "processes", "rows each", "memory of each", "sent a step by each", "gathered a pass",
    "idle for uneven shares",
)  # fmt: skip


def to_data(found: Sequence[Spread]) -> list[dict[str, Any]]:
    """Return what JSON holds."""
    return [each._asdict() for each in found]
