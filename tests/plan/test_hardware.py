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
    assert [name for name in found if not found[name].bf16] == ["V100", "T4"]
