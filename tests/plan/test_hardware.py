"""What `auto` becomes on a device, decided by pure functions: GPUs need not be there. Also what
--gpu understands.

Hermetic: no device is asked but this machine's memory. Alone: pytest tests/plan/test_hardware.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.common.errors import UsageError
from lora_cli.plan import auto, hardware
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.recipe import load, upstream

CPU = Hardware("cpu", "a processor", 16 * GIB)
AMPERE = Hardware("cuda", "A100", 80 * GIB, (8, 0), bf16=True, flash_attention=(2, 3), liger=True)
HOPPER = AMPERE._replace(name="H100", capability=(9, 0))
TURING = Hardware("cuda", "T4", 15 * GIB, (7, 5), flash_attention=(2,))


def test_a_gpu_is_named_by_size_or_by_name() -> None:
    assert hardware.parse_gpu("24GB").memory == hardware.parse_gpu("24 GiB").memory == 24 * GIB
    assert hardware.parse_gpu("A100-40GB").memory == 40 * GIB
    for text in ("H100", "h100", "NVIDIA H100"):
        assert (hardware.parse_gpu(text).name, hardware.parse_gpu(text).memory >> 20) == (
            "H100",
            81559,
        )
    assert hardware.parse_gpu("GeForce RTX 4090").name == "RTX 4090"
    assert not hardware.parse_gpu("T4").bf16
    with pytest.raises(UsageError) as caught:
        hardware.parse_gpu("H10O")
    assert caught.value.hint == "did you mean H100?"


def test_this_machine_s_memory_is_at_most_what_it_has() -> None:
    total = (
        int(Path("/proc/meminfo").read_text().split()[1]) << 10
        if Path("/proc/meminfo").exists()
        else 1 << 60
    )
    assert 0 < hardware.detect_device().memory <= total
    assert hardware.measure_peak_memory() > 10 << 20


def test_types_follow_device_and_checkpoint() -> None:
    assert hardware.dtype(HOPPER, "float32")[0] == "bfloat16"
    assert hardware.dtype(TURING, "bfloat16")[0] == "float32"
    assert hardware.dtype(CPU, "bfloat16")[0] == "float32"
    assert hardware.dtype(CPU._replace(bf16=True), "bfloat16")[0] == "bfloat16"
    assert hardware.dtype(CPU._replace(bf16=True), "float16")[0] == "float32"


def test_flash_attention_where_it_is_installed_and_works() -> None:
    assert hardware.attention(HOPPER, "bfloat16")[0] == "flash_attention_3"
    assert hardware.attention(AMPERE, "bfloat16")[0] == "flash_attention_2"
    assert hardware.attention(TURING, "float16")[0] is None
    assert hardware.attention(HOPPER, "float32")[0] is None
    assert hardware.attention(HOPPER._replace(flash_attention=()), "bfloat16")[0] is None
    assert hardware.attention(CPU, "bfloat16")[0] is None


def test_a_paged_optimizer_only_where_it_makes_the_run_fit() -> None:
    assert hardware.optimizer(HOPPER, 4 * GIB, 0)[0] == "adamw_torch_fused"
    assert hardware.optimizer(HOPPER, 4 * GIB, 2 * GIB)[0] == "paged_adamw_8bit"
    assert hardware.optimizer(HOPPER, 4 * GIB, 5 * GIB)[0] == "adamw_torch_fused"
    assert hardware.optimizer(CPU, 4 * GIB, 2 * GIB)[0] == "adamw_torch_fused"


def test_levers_without_a_measured_gain_are_off_and_say_why() -> None:
    for device in (CPU, TURING, AMPERE, HOPPER):
        for decide in (hardware.compiled, hardware.liger):
            value, reason = decide(device)
            assert value is False
            assert reason


def test_every_auto_is_recorded_with_its_reason_and_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\n")
    settled, choices = auto.settle(load.load_recipe(path), upstream.torch.float32, HOPPER)
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
    settled, choices = auto.settle(load.load_recipe(path, fixed), upstream.torch.float32, HOPPER)
    assert not {choice.name for choice in choices} & {text.partition("=")[0] for text in fixed}
    assert (settled.model.attn_implementation, settled.training.optim) == ("sdpa", "sgd")
    assert settled.training.dataloader_num_workers == 2


def test_the_memory_plan_is_asked_last_and_only_for_what_is_open(tmp_path: Path) -> None:
    path, asked = tmp_path / "r.yaml", []

    def levers(recipe):
        asked.append(recipe)
        return {"optim": ("lion_32bit", "because"), "gradient_checkpointing": (True, "it must")}

    path.write_text("model: {name_or_path: x}\ndata: {path: y}\ntraining: {optim: sgd}\n")
    settled, choices = auto.settle(load.load_recipe(path), upstream.torch.float32, CPU, levers)
    assert (settled.training.optim, settled.training.gradient_checkpointing) == ("sgd", True)
    assert asked[0].training.gradient_checkpointing is False
    values = {**dict(asked[0].model), **dict(asked[0].training)}
    assert {name for name, value in values.items() if value == "auto"} == {
        "chat_template",
        "pad_to_multiple_of",
    }
    assert str(choices[-1]) == "training.gradient_checkpointing = true (auto: it must)"
    path.write_text(
        "model: {name_or_path: x}\ndata: {path: y}\ntraining: {optim: sgd, "
        "gradient_checkpointing: true}\n"
    )
    auto.settle(load.load_recipe(path), upstream.torch.float32, CPU, levers)
    assert len(asked) == 1
