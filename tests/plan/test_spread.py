"""What several processes need and lose. Alone: pytest tests/plan/test_spread.py"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_cli.common import LoraError
from lora_cli.plan import auto, spread, weightless
from lora_cli.recipe import load

WHOLE = spread.Parts({"weights": 10})
ALPACA = [max(8, round(random.Random(number).lognormvariate(4.6, 0.67))) for number in range(5000)]


def make_recipe(write_recipe, rows: int, packing: str = "step"):
    return load.load_recipe(
        write_recipe(
            f"training: {{packing: {packing}, per_device_train_batch_size: {rows}, "
            "gradient_accumulation_steps: 1}\n"
        )
    )


@pytest.mark.parametrize(
    ("processes", "rows_each", "least", "most"),
    # rows dealt in order lose 0.36, 0.21, 0.33 and 0.55 of the time
    [(8, 4, 0.02, 0.15), (8, 16, 0.0, 0.02), (64, 16, 0.0, 0.02), (64, 4, 0.1, 0.3)],
)
def test_uneven_rows_cost_little_where_there_are_enough(
    processes: int, rows_each: int, least: float, most: float, write_recipe
) -> None:
    recipe = make_recipe(write_recipe, processes * rows_each)
    assert least <= spread.measure_idle(recipe, processes, ALPACA) <= most


def test_equal_rows_cost_nothing(write_recipe) -> None:
    for packing in ("step", "false"):
        assert spread.measure_idle(make_recipe(write_recipe, 32, packing), 4, [100] * 50) == 0
    # three rows in two processes: one waits for half of the time
    assert spread.measure_idle(make_recipe(write_recipe, 3), 2, [100] * 50) == 0.25


def test_padded_rows_of_a_length_stay_together(write_recipe) -> None:
    """Shares of equally many rows, each with one of the longest, would lose over half."""
    recipe = make_recipe(write_recipe, 1024, "false")
    assert spread.measure_idle(recipe, 64, ALPACA) < 0.1


def test_what_each_sends(write_recipe) -> None:
    recipe = make_recipe(write_recipe, 64)
    found = spread.foresee(recipe, 2, 1_000_000, WHOLE, ALPACA)
    assert [each.processes for each in found] == [2, 8, 64, 512]
    assert [each.sent for each in found] == [4_000_000, 7_000_000, 7_875_000, 7_984_375]
    assert [each.idle is None for each in found] == [False, False, False, True]
    with pytest.raises(LoraError, match="a step has 64 rows, and 65 processes"):
        spread.foresee(recipe, 65, 1, WHOLE, None)
    assert {(each.memory, each.gathered) for each in found} == {(10, 0)}


def test_what_each_holds_of_a_sharded_base(write_recipe, tiny: Path) -> None:
    """As FSDP2 has it: its share of everything that is sharded, with what is outside of the layers
    and two of these whole."""
    settings = (
        f"method: qlora\nmodel: {{name_or_path: {tiny / 'model'}}}\ndistributed: {{strategy: fsdp}}"
    )
    recipe, _ = auto.settle(load.load_recipe(write_recipe(settings)))
    network = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    outside = sum(
        tensor.nbytes for name, tensor in network.named_parameters() if ".layers." not in name
    )
    adapted = weightless.build_adapted(recipe, network.config)
    items = {"weights": outside + 6000, "adapters": 400, "optimizer": 800, "activations": 7}
    parts = spread.take_apart(recipe, items, adapted)
    assert parts.gathered == outside + 2 * 6000 // network.config.num_hidden_layers
    whole = sum(items.values())
    assert parts.measure(1) == whole
    assert parts.measure(4) == 7 + (whole - 7) // 4 + parts.gathered
    assert parts.count_gathered(4) == round(1.5 * (outside + 6000))
    unsharded = recipe.replace("sft", {"distributed": {"strategy": "ddp"}})
    assert spread.take_apart(unsharded, items, adapted).measure(4) == whole
    by_deepspeed = recipe.replace("sft", {"distributed": {"strategy": "deepspeed-zero3"}})
    parts = spread.take_apart(by_deepspeed, items, adapted)
    assert parts.measure(4) == whole - items["weights"] * 3 // 4 + items["weights"]
    assert parts.arriving is None  # what is quantised is loaded whole
    assert spread.take_apart(recipe, items, adapted).arriving == items["weights"]
    in_16_bits, _ = auto.settle(load.load_recipe(write_recipe(settings.replace("qlora", "lora"))))
    again = weightless.build_adapted(in_16_bits, network.config)
    parts = spread.take_apart(in_16_bits, items, again)
    assert parts.arriving == parts.gathered - 6000 // network.config.num_hidden_layers


def test_copies_that_do_not_divide_the_processes(write_recipe) -> None:
    recipe = load.load_recipe(write_recipe("distributed: {strategy: fsdp, replicas: 2}\n"))
    for processes in (2, 5):  # in two, none would be sharded
        with pytest.raises(LoraError, match="replicas: 2 copies cannot be sharded") as refused:
            spread.refuse_misfit(recipe, processes)
        assert refused.value.hint.startswith("--nproc 4, or")
    spread.refuse_misfit(recipe, 4)
    spread.refuse_misfit(recipe.replace("sft", {"distributed": {"strategy": "ddp"}}), 3)
    with pytest.raises(LoraError, match="distributed.replicas: deepspeed-zero3 has no copies"):
        load.load_recipe(write_recipe("distributed: {strategy: deepspeed-zero3, replicas: 2}\n"))


def test_a_base_is_loaded_whole_before_it_is_cut() -> None:
    parts = spread.Parts({"weights": 800, "activations": 7}, ("weights",), 100)
    assert parts.measure(4) == 800
    assert parts._replace(items={"weights": 800, "activations": 507}).measure(4) == 807


def test_a_base_whose_blocks_wait_on_the_host_arrives_block_by_block() -> None:
    parts = spread.Parts({"weights": 800, "activations": 7}, ("weights",), 100, arriving=90)
    assert parts.measure(4) == 7 + 200 + 100
    assert (
        parts._replace(arriving=150).measure(4) == 200 + 150
    )  # of DeepSpeed, whose step needs less


def test_copies_divide_what_is_shared() -> None:
    one = spread.Parts({"weights": 800, "activations": 900}, ("weights",), 100)
    two = one._replace(copies=2)
    assert two.measure(8) == one.measure(4) == 900 + 800 // 4 + 100
    assert two.count_gathered(8) == one.count_gathered(4)
