"""The device a run is for: this machine's, or one that is named."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from lora_cli.common import UsageError, devices, find_nearest
from lora_cli.recipe import Recipe

GIB = 1 << 30
FLASH_ATTENTION = {2: "flash_attn", 3: "flash_attn_interface"}
"""The module of each version of flash attention."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Hardware(NamedTuple):
    """A device and what it can compute with."""

    kind: str
    """As torch names it: `cpu`, `cuda` or `mps`."""
    name: str
    memory: int
    """In bytes."""
    capability: tuple[int, int] = (0, 0)
    """CUDA's compute capability."""
    bf16: bool = False
    """Whether it computes in bfloat16 natively."""
    flash_attention: tuple[int, ...] = ()
    """Versions of flash attention that are installed."""
    liger: bool = False
    """Whether Liger's kernels are installed."""

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / GIB:.1f} GiB"


class Card(NamedTuple):
    """A GPU that `--gpu` knows by its name."""

    memory_mib: int
    """As nvidia-smi and rocm-smi list it; the driver takes a few hundred of them."""
    capability: tuple[int, int]
    """CUDA's compute capability; (0, 0) for a GPU of another maker."""
    bf16: bool = True


CARDS = {
    "V100": Card(16384, (7, 0), bf16=False),
    "T4": Card(15360, (7, 5), bf16=False),
    "A100": Card(81920, (8, 0)),
    "A10": Card(23028, (8, 6)),
    "A10G": Card(23028, (8, 6)),
    "A6000": Card(49140, (8, 6)),
    "RTX 3090": Card(24576, (8, 6)),
    "L4": Card(23034, (8, 9)),
    "L40S": Card(46068, (8, 9)),
    "RTX 4090": Card(24564, (8, 9)),
    "H100": Card(81559, (9, 0)),
    "H200": Card(143771, (9, 0)),
    "B200": Card(183359, (10, 0)),
    "RTX 5090": Card(32607, (12, 0)),
    "MI300X": Card(196592, (0, 0)),
}


def find_training_device(recipe: Recipe) -> torch.device:
    """Find the device of this machine that a recipe trains on."""
    values = recipe.training.collect_values()
    return devices.find_device(recipe.quantized, bool(values.get("use_cpu")))


def detect_device(device: torch.device | None = None) -> Hardware:
    """Describe a device of this machine, by default the one that models train on."""
    device = device or devices.find_device()
    if device.type == "mps":
        # its memory is the processor's as well
        bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return Hardware("mps", "Apple's GPU", torch.mps.recommended_max_memory(), bf16=bf16)
    if device.type != "cuda":
        native = (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return Hardware("cpu", "this machine's memory", _measure_ram(), bf16=bool(native))
    index = device.index
    return Hardware(
        "cuda",
        torch.cuda.get_device_name(index),
        # what a screen or another job holds is not there for this one
        torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index),
        torch.cuda.get_device_capability(index),
        torch.cuda.is_bf16_supported(including_emulation=False),
        tuple(version for version, module in FLASH_ATTENTION.items() if find_spec(module)),
        find_spec("liger_kernel") is not None,
    )


def _measure_ram() -> int:
    """Return the machine's memory, or the container's share of it."""
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    limits = [int(text) for text in texts if text.isdigit()]
    return min([psutil.virtual_memory().total, *limits])


def parse_gpu(text: str) -> Hardware:
    """Return a GPU by size (`24GB`), name (`H100`) or both (`A100-40GB`); UsageError for others."""
    parts = re.fullmatch(r"(?:(.*[^\s-])[\s-]+)?(\d+(?:\.\d+)?)\s*Gi?B?\s*", text, re.IGNORECASE)
    named, size = (parts[1], int(float(parts[2]) * GIB)) if parts else (text, None)
    if size == 0:
        raise UsageError(f"--gpu: {text!r} has no memory", "give its size: --gpu 24GB")
    if not named and size:
        return Hardware("cuda", text, size, (8, 0), bf16=True)
    plain = {re.sub(r"\W", "", name).casefold(): name for name in CARDS}
    wanted = re.sub(r"\W|^(NVIDIA|GeForce|AMD)", "", named).casefold()
    if wanted not in plain:
        guess = find_nearest(wanted, plain)
        hint = f"did you mean {plain[guess]}?" if guess else "give its size: --gpu 24GB"
        raise UsageError(f"--gpu: {text!r} is neither a size nor a GPU known here", hint)
    name = plain[wanted]
    card = CARDS[name]
    return Hardware(
        "cuda",
        text if size else name,
        size or card.memory_mib << 20,
        card.capability,
        bf16=card.bf16,
    )


def measure_peak_memory() -> int:
    """Return the most bytes this process has had: of CUDA's allocator if there is one, else
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not find_spec("resource"):  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
