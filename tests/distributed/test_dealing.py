"""The rows of a step dealt over processes: none lost, none twice, about as many tokens each.

No process is started. Alone: pytest tests/distributed/test_dealing.py
"""

from __future__ import annotations

import random
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from lora_cli.distributed import ranks, shares
from lora_cli.distributed.place import Place
from lora_cli.train import dealing


@pytest.mark.parametrize("padded", [False, True])
def test_every_row_goes_to_one_process(padded: bool) -> None:
    chance = random.Random(0)
    for _ in range(300):
        world = chance.randint(1, 9)
        lengths = [chance.randint(1, 300) for _ in range(chance.randint(0, 40))]
        dealt = shares.deal(lengths, world, padded)
        assert len(dealt) == world
        assert sorted(chain.from_iterable(dealt)) == list(range(len(lengths)))
        assert all(share == sorted(share) for share in dealt)
        if padded:
            padded_to = [
                max(lengths[place] for place in share) * len(share) for share in dealt if share
            ]
            assert max(padded_to, default=0) <= -(-len(lengths) // world) * max(lengths, default=0)
        elif lengths:  # by tokens nobody has more than the others by a row's
            tokens = [sum(lengths[place] for place in share) for share in dealt]
            assert max(tokens) - min(tokens) <= max(lengths)
    assert shares.deal([5, 9, 2], 1, padded) == [[0, 1, 2]]


class Arguments(SimpleNamespace):
    """What the loader asks of TrainingArguments."""

    seed = 42
    data_seed = None
    ddp_find_unused_parameters = None
    accelerator_config = SimpleNamespace(non_blocking=False)


NETWORK = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
CASES = [(8, 1, 2), (4, 3, 2), (1, 16, 8), (3, 3, 2), (2, 3, 4), (5, 1, 5), (1, 5, 2), (2, 7, 3)]


def make_arguments(rows: int, passes: int) -> Arguments:
    return Arguments(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        per_device_eval_batch_size=2,
        gradient_checkpointing=False,
    )


@pytest.mark.parametrize(("rows", "passes", "world"), CASES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_step_keeps_its_rows(
    rows: int, passes: int, world: int, drop_last: bool, monkeypatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: world)
    for number in (1, 7, 31, 45):
        arguments = make_arguments(rows, passes)
        batches = dealing.spread(arguments, NETWORK, stream=False)
        made = dealing.StepBatches(range(number), batches, drop_last)
        listed = list(made)
        assert len(made) == len(listed)
        assert arguments.gradient_accumulation_steps == batches.passes <= passes
        alone = list(BatchSampler(range(number), rows, drop_last))
        for step in range(-(-len(alone) // passes)):
            own = alone[step * passes : (step + 1) * passes]
            dealt = listed[step * batches.passes : (step + 1) * batches.passes]
            assert list(chain.from_iterable(own)) == list(chain.from_iterable(dealt))
        assert len(listed) <= (step + 1) * batches.passes if alone else not listed
        assert all(-(-len(batch) // world) <= rows for batch in listed)
        # a stream's batches are all of one size
        arguments = Arguments(
            **vars(arguments)
            | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
        )
        streamed = dealing.spread(arguments, NETWORK, stream=True)
        assert arguments.per_device_train_batch_size * streamed.passes == rows * passes


@pytest.mark.parametrize(("rows", "passes", "world"), CASES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_are_drawn_by_their_lengths_as_in_one_process(
    rows: int, passes: int, world: int, drop_last: bool, monkeypatch
) -> None:
    lengths = random.Random(0).choices(range(1, 99), k=300)
    monkeypatch.setattr(ranks, "count", lambda: world)
    arguments = make_arguments(rows, passes)
    batches = dealing.spread(arguments, NETWORK, stream=False)
    size = arguments.per_device_train_batch_size * batches.passes  # as Trainer reckons it
    alone, several = (LengthGroupedSampler(each, lengths=lengths) for each in (rows * passes, size))
    groups = dealing.settle_sampler(alone, 7, None), dealing.settle_sampler(several, 7, batches)
    assert list(groups[0]) == list(groups[1])
    drawn, parts = (
        BatchRebalanceSampler(lengths, *given, drop_last=drop_last)
        for given in ((rows * passes, 1, passes), (size * world, world, batches.passes))
    )
    assert dealing.settle_sampler(drawn, 7, None) is drawn
    settled = dealing.settle_sampler(parts, 7, batches)
    settled.set_epoch(3)
    drawn.set_epoch(3)
    whole, dealt = list(drawn), list(dealing.StepBatches(settled, batches, drop_last))
    for step in range(300 // (rows * passes)):
        own, shared = (
            sorted(chain.from_iterable(listed[step * number : (step + 1) * number]))
            for listed, number in ((whole, passes), (dealt, batches.passes))
        )
        assert own == shared
        assert len(own) == rows * passes
    assert drop_last or len(set(chain.from_iterable(dealt))) == 300


@pytest.mark.parametrize("stream", [False, True])
def test_processes_load_one_processes_batches(stream: bool, monkeypatch) -> None:
    """42 rows in batches of 8, two epochs, in 4 processes, of which the last batch leaves two none."""
    lengths = [random.Random(place).randint(2, 30) for place in range(42)]
    ids = [[place] * length for place, length in enumerate(lengths, start=1)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})

    def load(world: int, rank: int) -> list[list[int]]:
        monkeypatch.setattr(ranks, "_place", Place(rank, world, rank, world, "", 0))
        given = rows.to_iterable_dataset() if stream else rows
        loader = DataLoader(
            given, 8, shuffle=None if stream else True, collate_fn=lambda some: some
        )
        dealt = dealing.deal_loader(Arguments(), torch.device("cpu"), loader, None)
        batches = []
        for epoch in (0, 1):
            dealt.set_epoch(epoch)
            batches += [[row["input_ids"][0] for row in batch] for batch in dealt]
        return batches

    whole = load(1, 0)
    assert [len(batch) for batch in whole] == 2 * [8, 8, 8, 8, 8, 2]
    assert stream or whole[:6] != whole[6:]
    shares = [load(4, rank) for rank in range(4)]
    for batch, *dealt in zip(whole, *shares, strict=True):
        together = [place for share in dealt for place in share]
        empty = [0] * (len(together) - len(batch))  # the ids of rows that stand for none
        assert sorted(together) == sorted([*empty, *batch])
        assert len(empty) == (2 if len(batch) == 2 else 0)
