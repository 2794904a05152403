"""Deal the rows of each step over the processes that train together: the step's rows are the same
however many there are.

Every process draws the same batches, those of one process, and takes its share of each: no row
comes twice, none is lost, and the number of processes need not divide anything. Shares are of about
as many tokens, as the slowest process is the step's time. A process without a row takes part with
one of two tokens that no loss is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, cycle, islice
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from lora_cli.data import prepare
from lora_cli.distributed import ranks, shares
from lora_cli.models import IGNORED, num_experts
from lora_cli.speed import step_packing
from lora_cli.train.pair_batches import ComparedPairs

Rows = list[dict[str, Any]]
EMPTY: dict[str, Any] = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
"""The row of a process that has none in a batch."""


class Batches(NamedTuple):
    """How a step's rows come: in how many passes, and how many rows one process takes at a time."""

    step: int
    passes: int
    rows: int


def spread(arguments: TrainingArguments, adapted: PeftModel, stream: bool) -> Batches | None:
    """Turn the batches of one process, in place, into those that are dealt over all, and return
    them; None where there is one process. The step's rows stay the same, in as few passes as one
    process has rows for at a time.

    The batches of a stream are all of one size, which may take more passes. DDP looks for tensors
    without a gradient only in models with experts, which not every rank's tokens may reach: it
    takes a walk of the graph in each step.
    """
    world, rows = ranks.count(), arguments.per_device_train_batch_size
    step = rows * arguments.gradient_accumulation_steps
    if world == 1:
        return None
    passes = -(-step // (world * rows))
    while stream and step % passes:
        passes += 1
    arguments.gradient_accumulation_steps = passes
    arguments.per_device_train_batch_size = -(-step // passes)
    arguments.per_device_eval_batch_size *= world
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = num_experts(adapted.config) > 0
    arguments.ddp_broadcast_buffers = False
    arguments.average_tokens_across_devices = True  # or it is another run
    arguments.save_on_each_node = False
    if arguments.gradient_checkpointing and not arguments.gradient_checkpointing_kwargs:
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
    return Batches(step, passes, rows)


class StepBatches(BatchSampler):
    """The batches of each step's passes, about as large as each other; the last step has fewer."""

    def __init__(self, sampler: Sampler[int], batches: Batches, drop_last: bool) -> None:
        super().__init__(sampler, batches.step, drop_last=False)
        small, larger = divmod(batches.step, batches.passes)
        self.sizes = [small + (number < larger) for number in range(batches.passes)]
        number = len(sampler)
        self.rows = number - number % batches.rows if drop_last else number

    def __iter__(self) -> Iterator[list[int]]:
        rows = islice(self.sampler, self.rows)
        for size in cycle(self.sizes):
            if not (batch := list(islice(rows, size))):
                return
            yield batch

    def __len__(self) -> int:
        steps, rest = divmod(self.rows, self.batch_size)
        last = sum(start < rest for start in accumulate(self.sizes[:-1], initial=0))
        return steps * len(self.sizes) + last


class SeededGroups(LengthGroupedSampler):
    """Draws rows of about the same length together, in an order that seed and epoch decide: Trainer
    draws it from numbers that dropout draws from as well, which each process has others of. The
    groups are those of one process, whose steps have so many `rows`."""

    def __init__(self, drawn: LengthGroupedSampler, seed: int, rows: int) -> None:
        super().__init__(rows, lengths=drawn.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from super().__iter__()


class SeededSteps(Sampler[int]):
    """The rows in the order of transformers' sampler that balances those of each step, which are so
    many `rows`, in one process; in several it has parts of them, and here they are dealt."""

    def __init__(self, drawn: BatchRebalanceSampler, rows: int) -> None:
        self.drawn, number = drawn, len(drawn.lengths)
        self.number = number - number % rows if drawn.drop_last else number

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.drawn.set_epoch(epoch)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        numbers = torch.Generator().manual_seed(self.drawn.seed + self.drawn.epoch)
        order = torch.randperm(len(self.drawn.lengths), generator=numbers)
        yield from order[: self.number].tolist()


def settle_sampler(drawn: Any, seed: int, batches: Batches | None) -> Any:
    """Return what draws the rows of each step as in one process, in the place of Trainer's own;
    `batches` are None where there is one."""
    if isinstance(drawn, LengthGroupedSampler):
        return SeededGroups(drawn, seed, batches.step if batches else drawn.batch_size)
    if isinstance(drawn, BatchRebalanceSampler) and batches:
        return SeededSteps(drawn, batches.step)
    return drawn


class Dealt(torch.utils.data.Dataset[dict[str, Any]]):
    """This process's share of each batch of rows that are asked for."""

    def __init__(self, rows: Dataset | ComparedPairs, padded: bool) -> None:
        self.rows, self.padded = rows, padded
        self.lengths = prepare.find_lengths(rows.rows if isinstance(rows, ComparedPairs) else rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[place]
        return row

    def __getitems__(self, places: list[int]) -> Rows:
        own = shares.deal(self.lengths[places].tolist(), ranks.count(), self.padded)
        return [self.rows[places[each]] for each in own[ranks.number()]]


class Collate:
    """Collates this process's share of a batch; of a stream, whose rows have no places, it is
    taken here."""

    def __init__(self, collate: Callable[[Rows], Any], padded: bool, stream: bool) -> None:
        self.collate, self.padded, self.stream = collate, padded, stream

    def __call__(self, rows: Rows) -> Any:
        if self.stream:
            lengths = [len(row.get("input_ids", [0])) for row in rows]
            own = shares.deal(lengths, ranks.count(), self.padded)[ranks.number()]
            rows = [rows[place] for place in own]
        return self.collate(rows or [EMPTY])


def deal_loader(
    arguments: TrainingArguments,
    device: torch.device,
    loader: DataLoader[Any],
    batches: Batches | None,
) -> DataLoader[Any]:
    """Return a loader of batches for one process as one of this process's shares of them, on the
    device; `batches` are those of a step, for training."""
    stream = isinstance(loader.dataset, IterableDataset)
    padded = not isinstance(loader.collate_fn, step_packing.StepCollator)
    dealt = DataLoader(
        loader.dataset if stream else Dealt(loader.dataset, padded),
        collate_fn=Collate(loader.collate_fn, padded, stream),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        worker_init_fn=loader.worker_init_fn,
        **_list_batches(loader, batches),
    )
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return prepare_data_loader(
        dealt,
        device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        use_seedable_sampler=True,
        data_seed=seed,
        non_blocking=arguments.accelerator_config.non_blocking,
    )


def _list_batches(loader: DataLoader[Any], batches: Batches | None) -> dict[str, Any]:
    """Return the arguments by which a loader has the batches of `loader`, or those of steps."""
    if isinstance(loader.dataset, IterableDataset):
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if batches is None:
        return {"batch_sampler": loader.batch_sampler}
    return {"batch_sampler": StepBatches(loader.sampler, batches, loader.drop_last)}
