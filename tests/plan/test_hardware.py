"""The device a run is for: what --gpu understands, and what is known of this machine.

Hermetic: no device is asked but this machine's memory. Alone: pytest tests/plan/test_hardware.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.common.errors import UsageError
from lora_cli.plan import hardware
from lora_cli.plan.hardware import GIB


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
    small = hardware.parse_gpu("T4-16GB")
    assert (small.memory, small.capability, small.bf16) == (16 * GIB, (7, 5), False)


@pytest.mark.parametrize("text", ["-3GB", "0GB", "banana 3GB", "24GB of memory", ""])
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu: "):
        hardware.parse_gpu(text)


def test_this_machine_s_memory_is_at_most_what_it_has() -> None:
    total = (
        int(Path("/proc/meminfo").read_text().split()[1]) << 10
        if Path("/proc/meminfo").exists()
        else 1 << 60
    )
    assert 0 < hardware.detect_device().memory <= total
    assert hardware.measure_peak_memory() > 10 << 20


def test_a_gpu_has_its_own_compute_capability() -> None:
    found = {name: hardware.parse_gpu(name) for name in hardware.CARDS}
    assert {name: found[name].capability for name in ("T4", "V100", "L4", "B200")} == {
        "T4": (7, 5),
        "V100": (7, 0),
        "L4": (8, 9),
        "B200": (10, 0),
    }
    families = {"1": 6, "2": 7, "3": 8, "4": 8, "5": 12}  # GTX 10 … RTX 50
    games = [name for name in found if name.startswith(("RTX ", "GTX ")) and name[4:8].isdigit()]
    games = [name for name in games if name not in ("RTX 8000", "RTX 6000 Ada")]
    assert len(games) >= 25
    assert not [name for name in games if found[name].capability[0] != families[name[4]]]
    # bfloat16 came with Ampere; AMD's cards have no CUDA capability, and bfloat16
    assert not [
        name for name, card in found.items() if card.bf16 != (card.capability[0] not in (6, 7))
    ]
    assert all(5 * GIB < card.memory < 200 * GIB for card in found.values())


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 24576 << 20),
        ("Tesla T4", "T4", 15360 << 20),
        ("4090", "RTX 4090", 24564 << 20),
        ("rtx4070ti", "RTX 4070 Ti", 12282 << 20),
        ("NVIDIA RTX A6000", "A6000", 49140 << 20),
        ("NVIDIA RTX 6000 Ada", "RTX 6000 Ada", 49140 << 20),
        ("AMD Instinct MI300X", "MI300X", 196592 << 20),
        ("NVIDIA H100 PCIe", "H100", 81559 << 20),
        ("NVIDIA H100 NVL", "H100 NVL", 95830 << 20),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", 80 * GIB),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", 40 * GIB),
        ("Tesla V100-SXM2-32GB", "Tesla V100-SXM2-32GB", 32 * GIB),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB", 16 * GIB),
    ],
)
def test_a_card_is_known_as_others_write_it(text: str, name: str, memory: int) -> None:
    found = hardware.parse_gpu(text)
    assert (found.name, found.memory) == (name, memory)
