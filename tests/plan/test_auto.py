"""What `auto` becomes on a device and why; the device is given, so that those for GPUs need none.

Hermetic: nothing is loaded. Alone: pytest tests/plan/test_auto.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_cli.common.errors import LoraError
from lora_cli.plan import auto, memory, outlook
from lora_cli.plan.auto_choices import (
    Situation,
    choose_attention,
    choose_compilation,
    choose_dtype,
    choose_liger,
)
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.recipe import keys, load

CPU = Hardware("cpu", "a processor", 16 * GIB)
AMPERE = Hardware("cuda", "A100", 80 * GIB, (8, 0), bf16=True, flash_attention=(2, 3), liger=True)
HOPPER = AMPERE._replace(name="H100", capability=(9, 0))
TURING = Hardware("cuda", "T4", 15 * GIB, (7, 5), flash_attention=(2,))


def situation(device: Hardware, on_disk: str = "float32", dtype: str = "auto") -> Situation:
    model = keys.Model(name_or_path="x", dtype=dtype)
    recipe = keys.Recipe(model=model, data=keys.Data(path="x"), output_dir="x")
    return Situation(recipe, device, LlamaConfig(dtype=on_disk))


def test_types_follow_device_and_checkpoint() -> None:
    assert choose_dtype(situation(HOPPER, "float32"))[0] == "bfloat16"
    assert choose_dtype(situation(TURING, "bfloat16"))[0] == "float16"
    pascal = TURING._replace(capability=(6, 1))
    assert choose_dtype(situation(pascal, "bfloat16"))[0] == "float32"
    assert choose_dtype(situation(CPU, "bfloat16"))[0] == "float32"
    assert choose_dtype(situation(CPU._replace(bf16=True), "bfloat16"))[0] == "bfloat16"
    assert choose_dtype(situation(CPU._replace(bf16=True), "float16"))[0] == "float32"


def test_flash_attention_where_it_is_installed_and_works() -> None:
    assert choose_attention(situation(HOPPER, dtype="bfloat16"))[0] == "flash_attention_3"
    assert choose_attention(situation(AMPERE, dtype="bfloat16"))[0] == "flash_attention_2"
    assert choose_attention(situation(TURING, dtype="float16"))[0] is None
    assert choose_attention(situation(HOPPER, dtype="float32"))[0] is None
    bare = HOPPER._replace(flash_attention=())
    assert choose_attention(situation(bare, dtype="bfloat16"))[0] is None
    assert choose_attention(situation(CPU, dtype="bfloat16"))[0] is None


@pytest.mark.parametrize(
    ("device", "missing", "expected"),
    [
        (HOPPER, 0, "adamw_torch_fused"),
        (HOPPER, 2 * GIB, "paged_adamw_8bit"),
        (HOPPER, 5 * GIB, "adamw_torch_fused"),
        (CPU, 2 * GIB, "adamw_torch_fused"),
    ],
)
def test_a_paged_optimizer_only_where_it_makes_the_run_fit(
    device: Hardware, missing: int, expected: str
) -> None:
    foreseen = outlook.Outlook(True, "", state=4 * GIB, missing=missing)
    assert outlook.choose_optimizer(device, foreseen)[0] == expected


@pytest.mark.parametrize(
    ("device", "missing", "more", "expected"),
    [
        (HOPPER, -1, (), "ddp"),
        (HOPPER, 2 * GIB, (), "ddp"),  # an optimiser of 8 bits makes it fit
        (HOPPER, 2 * GIB, ("training.optim=sgd",), "fsdp"),
        (HOPPER, 4 * GIB, (), "fsdp"),
        (HOPPER, 4 * GIB, ("training.torch_compile=true",), "ddp"),
        (CPU, 4 * GIB, (), "ddp"),
    ],
)
def test_a_base_is_sharded_where_it_fits_no_gpu(
    device: Hardware, missing: int, more: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    given = Situation(load.load_recipe(path, list(more)), device, None, 2)
    foreseen = outlook.Outlook(True, "", state=4 * GIB, missing=missing)
    chosen, reason = outlook.choose_strategy(given, foreseen)
    assert chosen == expected
    assert ("GiB more than" in reason) is (expected == "fsdp")
    assert ("compiled" in reason) is bool(more and "compile" in more[0])


@pytest.mark.slow
def test_how_work_is_shared_is_open_where_one_trains_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    recipe, big = load.load_recipe(path), LlamaConfig(**LLAMA_8B)
    small = AMPERE._replace(memory=12 * GIB)
    for processes, expected in ((1, "auto"), (2, "fsdp")):
        settled, choices = auto.settle(recipe, big, small, processes)
        assert settled.distributed.strategy == expected
        said = [choice for choice in choices if choice.name == "distributed.strategy"]
        assert len(said) == processes - 1
    fixed = ["training.optim=sgd", "training.gradient_checkpointing=true"]
    settled, _ = auto.settle(load.load_recipe(path, fixed), big, small, 2)
    assert settled.distributed.strategy == "fsdp"


def test_options_without_a_measured_gain_are_off_and_say_why() -> None:
    for device in (CPU, TURING, AMPERE, HOPPER):
        for choose in (choose_compilation, choose_liger):
            value, reason = choose(situation(device))
            assert value is False
            assert reason


def test_every_auto_is_recorded_with_its_reason_and_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    settled, choices = auto.settle(load.load_recipe(path), device=HOPPER)
    made = {choice.name: choice for choice in choices}
    assert len(made) == len(choices) >= 12
    assert all(choice.reason for choice in choices)
    assert (
        made["model.attn_implementation"].value
        == settled.model.attn_implementation
        == "flash_attention_3"
    )
    assert (
        made["training.gradient_checkpointing"].value
        is settled.training.gradient_checkpointing
        is True
    )
    fixed = [
        "model.attn_implementation=sdpa",
        "training.gradient_checkpointing=false",
        "training.optim=sgd",
        "training.torch_compile=false",
        "training.dataloader_num_workers=2",
    ]
    settled, choices = auto.settle(load.load_recipe(path, fixed), device=HOPPER)
    assert not {choice.name for choice in choices} & {text.partition("=")[0] for text in fixed}
    assert (settled.model.attn_implementation, settled.training.optim) == ("sdpa", "sgd")
    assert settled.training.dataloader_num_workers == 2


def test_the_memory_plan_is_asked_last_and_only_for_what_is_open(
    tmp_path: Path, monkeypatch
) -> None:
    asked: list[keys.Recipe] = []

    def refuse(recipe: keys.Recipe, *others: object) -> None:
        asked.append(recipe)
        raise LoraError("not to be foreseen")

    monkeypatch.setattr(memory, "make_forecast", refuse)
    path, small = tmp_path / "r.yaml", CPU._replace(memory=1)
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\ntraining: {optim: sgd}\n")
    settled, choices = auto.settle(load.load_recipe(path), LlamaConfig(), small)
    assert (settled.training.optim, settled.training.gradient_checkpointing) == ("sgd", False)
    assert asked[0].training.gradient_checkpointing is False
    values = {**dict(asked[0].model), **dict(asked[0].training)}
    assert {name for name, value in values.items() if value == "auto"} == {
        "chat_template",
        "labels",  # of what tells some apart
        "problem_type",
        "pad_to_multiple_of",
        "packed_length",
    }
    assert str(choices[-2]) == "training.gradient_checkpointing = false (auto: not to be foreseen)"
    path.write_text(
        "model: {name_or_path: x}\ndata: {path: y}\ntraining: {gradient_checkpointing: true}\n"
    )
    settled, choices = auto.settle(load.load_recipe(path), LlamaConfig(), small)
    assert str(choices[-2]) == "training.optim = adamw_torch_fused (auto: the fastest AdamW)"
    assert len(asked) == 1


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("device", "more", "training", "expected"),
    [
        (HOPPER, {}, {}, 8192),
        (HOPPER._replace(memory=40 * GIB), {}, {}, 2048),
        (HOPPER._replace(memory=24 * GIB), {}, {}, 8192),  # with checkpointing
        (HOPPER._replace(memory=18 * GIB), {}, {}, 1024),
        (HOPPER, {}, {"max_length": 256, "gradient_accumulation_steps": 1}, 2048),
        (HOPPER, {"attention_dropout": 0.1}, {}, 1024),
        (HOPPER, {"sliding_window": 2047}, {"max_length": 2048}, 1024),
        (HOPPER, {}, {"packing": False}, None),
        (HOPPER, {}, {"packed_length": 3000}, 3000),
        (TURING, {}, {}, 1024),
        (CPU, {}, {}, 1024),
        (CPU, {}, {"max_length": 512}, 512),
    ],
)
def test_rows_are_joined_to_long_sequences_where_attention_allows_and_memory_holds_them(
    device: Hardware, more: dict, training: dict, expected: int | None
) -> None:
    recipe = keys.Recipe(
        model=keys.Model(name_or_path="x"),
        data=keys.Data(path="x"),
        output_dir="x",
        training=keys.Training(**{"per_device_train_batch_size": 8, **training}),
    )
    bare = device._replace(flash_attention=())
    settled, _ = auto.settle(recipe, LlamaConfig(**LLAMA_8B, **more), bare)
    assert settled.training.packed_length == expected


def test_a_run_that_goes_on_keeps_what_auto_became() -> None:
    recipe = keys.Recipe(
        model=keys.Model(name_or_path="x"), data=keys.Data(path="x"), output_dir="x"
    )
    small, large = (HOPPER._replace(memory=size * GIB) for size in (40, 80))
    config = LlamaConfig(**LLAMA_8B)
    began, _ = auto.settle(recipe, config, small._replace(flash_attention=()))
    kept = auto.take_recorded(recipe, began.to_data(), Path("record.json"))
    again, choices = auto.settle(kept, config, large._replace(flash_attention=()))
    assert again.to_data() == began.to_data()
    assert not choices
    own = recipe.replace("trainer", {"training": {"packed_length": 512}})
    assert (
        auto.take_recorded(own, began.to_data(), Path("record.json")).training.packed_length == 512
    )
