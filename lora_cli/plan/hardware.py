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
    # Pascal: no tensor cores, float32 only
    "P100": Card(16384, (6, 0), bf16=False),
    "P40": Card(24576, (6, 1), bf16=False),
    "GTX 1080 Ti": Card(11264, (6, 1), bf16=False),
    # Volta and Turing: float16, no bfloat16
    "V100": Card(16384, (7, 0), bf16=False),
    "T4": Card(15360, (7, 5), bf16=False),
    "RTX 2060": Card(6144, (7, 5), bf16=False),
    "RTX 2070": Card(8192, (7, 5), bf16=False),
    "RTX 2080": Card(8192, (7, 5), bf16=False),
    "RTX 2080 Ti": Card(11264, (7, 5), bf16=False),
    "TITAN RTX": Card(24576, (7, 5), bf16=False),
    "RTX 8000": Card(49152, (7, 5), bf16=False),
    # Ampere
    "A100": Card(81920, (8, 0)),
    "A30": Card(24576, (8, 0)),
    "A2": Card(15356, (8, 6)),
    "A10": Card(23028, (8, 6)),
    "A10G": Card(23028, (8, 6)),
    "A40": Card(46068, (8, 6)),
    "A4000": Card(16376, (8, 6)),
    "A4500": Card(20470, (8, 6)),
    "A5000": Card(24564, (8, 6)),
    "A6000": Card(49140, (8, 6)),
    "RTX 3050": Card(8192, (8, 6)),
    "RTX 3060": Card(12288, (8, 6)),
    "RTX 3060 Ti": Card(8192, (8, 6)),
    "RTX 3070": Card(8192, (8, 6)),
    "RTX 3070 Ti": Card(8192, (8, 6)),
    "RTX 3080": Card(10240, (8, 6)),
    "RTX 3080 Ti": Card(12288, (8, 6)),
    "RTX 3090": Card(24576, (8, 6)),
    "RTX 3090 Ti": Card(24564, (8, 6)),
    # Ada
    "L4": Card(23034, (8, 9)),
    "L40": Card(46068, (8, 9)),
    "L40S": Card(46068, (8, 9)),
    "RTX 4060": Card(8188, (8, 9)),
    "RTX 4060 Ti": Card(8188, (8, 9)),
    "RTX 4070": Card(12282, (8, 9)),
    "RTX 4070 Ti": Card(12282, (8, 9)),
    "RTX 4070 Ti SUPER": Card(16376, (8, 9)),
    "RTX 4080": Card(16376, (8, 9)),
    "RTX 4080 SUPER": Card(16376, (8, 9)),
    "RTX 4090": Card(24564, (8, 9)),
    "RTX 6000 Ada": Card(49140, (8, 9)),
    # Hopper
    "H100": Card(81559, (9, 0)),
    "H100 NVL": Card(95830, (9, 0)),
    "H20": Card(97871, (9, 0)),
    "GH200": Card(97871, (9, 0)),
    "H200": Card(143771, (9, 0)),
    "H200 NVL": Card(143771, (9, 0)),
    # Blackwell
    "B200": Card(183359, (10, 0)),
    "RTX 5060": Card(8151, (12, 0)),
    "RTX 5060 Ti": Card(16311, (12, 0)),
    "RTX 5070": Card(12227, (12, 0)),
    "RTX 5070 Ti": Card(16303, (12, 0)),
    "RTX 5080": Card(16303, (12, 0)),
    "RTX 5090": Card(32607, (12, 0)),
    "RTX PRO 6000": Card(97887, (12, 0)),
    # AMD
    "RX 7900 XTX": Card(24560, (0, 0)),
    "MI210": Card(65520, (0, 0)),
    "MI300X": Card(196592, (0, 0)),
}
"""Those that people have at home or rent. A card that was sold with several sizes is here with one
of them; `--gpu A100-40GB` says another."""
FORMS = (
    r"[\s-]+(PCIe?|SXM\d?|HBM\d\w?|480GB|Generation|"
    r"(Blackwell )?(Max-Q )?(Workstation|Server) Edition)(?![^\s-])"
)
"""What a maker adds to a card's name: how it is plugged in, the kind of its memory, its chip and
case; of GH200 the processor's memory."""


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
    """Return a GPU by size (`24GB`), name (`H100`) or both (`A100-40GB`); UsageError for others.

    Names are also understood as nvidia-smi and shops write them: `NVIDIA A100-SXM4-40GB`, `4090`.
    """
    plain = re.sub(FORMS, "", text, flags=re.IGNORECASE)
    parts = re.fullmatch(r"(?:(.*[^\s-])[\s-]+)?(\d+(?:\.\d+)?)\s*Gi?B?\s*", plain, re.IGNORECASE)
    named, size = (parts[1], int(float(parts[2]) * GIB)) if parts else (plain, None)
    if size == 0:
        raise UsageError(f"--gpu: {text!r} has no memory", "give its size: --gpu 24GB")
    if not named and size:
        return Hardware("cuda", text, size, (8, 0), bf16=True)
    name = _find_card(named, text)
    card = CARDS[name]
    return Hardware(
        "cuda",
        text if size else name,
        size or card.memory_mib << 20,
        card.capability,
        bf16=card.bf16,
    )


def _find_card(named: str, text: str) -> str:
    """Return the name in CARDS that is meant; UsageError with the nearest where there is none."""
    known = {_squeeze(name): name for name in CARDS}
    wanted = re.sub(r"^(nvidia|geforce|amd|tesla|quadro|instinct|radeon)+", "", _squeeze(named))
    for guess in (wanted, f"rtx{wanted}", wanted.removeprefix("rtx")):  # RTX A6000 is A6000
        if guess in known:
            return known[guess]
    near = find_nearest(wanted, known)
    hint = f"did you mean {known[near]}?" if near else "give its size: --gpu 24GB"
    raise UsageError(f"--gpu: {text!r} is neither a size nor a GPU known here", hint)


def _squeeze(name: str) -> str:
    return re.sub(r"\W", "", name).casefold()


def measure_memory() -> int:
    """Return the bytes that this process has now: of CUDA's allocator if there is one, else
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


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
