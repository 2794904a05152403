"""The device a run is for: this machine's, or one that is named; and what `auto` becomes on it, as
far as it decides.

The decisions are pure functions of `Hardware`, so that those for GPUs can be tested without one. A
lever is on where a benchmark here showed a gain, or where somebody installed it on purpose.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from lora_cli.common import UsageError, find_nearest

GIB = 1 << 30
# What nvidia-smi and rocm-smi list, in MiB; the driver takes a few hundred of them.
MEMORY_MIB = {
    "T4": 15360, "V100": 16384, "L4": 23034, "A10": 23028, "A10G": 23028, "RTX 3090": 24576, "RTX 4090": 24564,
    "RTX 5090": 32607, "A100": 81920, "A6000": 49140, "L40S": 46068, "H100": 81559, "H200": 143771, "B200": 183359,
    "MI300X": 196592,
}  # fmt: skip
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Hardware(NamedTuple):
    """A device: `kind` as torch names it, its memory in bytes, and what is there to compute
    with."""

    kind: str
    name: str
    memory: int
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


def detect_device() -> Hardware:
    """This machine's first CUDA device, or its processor and memory."""
    if not torch.cuda.is_available():
        native = (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return Hardware("cpu", "this machine's memory", _measure_ram(), bf16=bool(native))
    index = torch.cuda.current_device()
    return Hardware(
        "cuda",
        torch.cuda.get_device_name(index),
        torch.cuda.get_device_properties(index).total_memory,
        torch.cuda.get_device_capability(index),
        torch.cuda.is_bf16_supported(including_emulation=False),
        tuple(
            version
            for version, module in ((2, "flash_attn"), (3, "flash_attn_interface"))
            if find_spec(module)
        ),
        find_spec("liger_kernel") is not None,
    )


def _measure_ram() -> int:
    """The machine's memory, or the container's share of it."""
    limits = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min(
        [psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())]
    )


def parse_gpu(text: str) -> Hardware:
    """A GPU by its size (`24GB`), its name (`H100`) or both (`A100-40GB`); UsageError for one that
    is not known."""
    size = re.search(r"(\d+(?:\.\d+)?)\s*Gi?B?$", text, re.IGNORECASE)
    if size:
        return Hardware("cuda", text, int(float(size[1]) * GIB), (8, 0), bf16=True)
    plain = {re.sub(r"\W", "", name).casefold(): name for name in MEMORY_MIB}
    wanted = re.sub(r"\W|^(NVIDIA|GeForce|AMD)", "", text).casefold()
    if wanted not in plain:
        guess = find_nearest(wanted, plain)
        hint = f"did you mean {plain[guess]}?" if guess else "give its size: --gpu 24GB"
        raise UsageError(f"--gpu: {text!r} is neither a size nor a GPU known here", hint)
    name = plain[wanted]
    capability = (
        (7, 0) if name in ("T4", "V100") else (9, 0) if name in ("H100", "H200") else (8, 0)
    )
    return Hardware("cuda", name, MEMORY_MIB[name] << 20, capability, bf16=capability >= (8, 0))


def dtype(hardware: Hardware, on_disk: str) -> tuple[str, str]:
    """model.dtype, for a checkpoint of type `on_disk`, and why."""
    if hardware.kind == "cuda":
        if hardware.bf16:
            return "bfloat16", "this GPU computes it natively"
        return "float32", "this GPU has no native bfloat16"
    if on_disk == "bfloat16" and hardware.bf16:
        return "bfloat16", "the checkpoint's type, which this CPU computes natively"
    return "float32", f"without CUDA the safe choice for a {on_disk} checkpoint"


def attention(hardware: Hardware, dtype: str) -> tuple[str | None, str]:
    """model.attn_implementation; None leaves it to transformers, which takes sdpa where the model
    has it."""
    if hardware.kind == "cuda" and dtype != "float32":
        if 3 in hardware.flash_attention and hardware.capability[0] == 9:
            return "flash_attention_3", "installed, and this GPU is of its kind"
        if 2 in hardware.flash_attention and hardware.capability >= (8, 0):
            return "flash_attention_2", "installed"
    return None, "transformers' choice, sdpa where the model has it"


def compiled(hardware: Hardware) -> tuple[bool, str]:
    """training.torch_compile."""
    if hardware.kind == "cuda":
        return False, "not measured on a GPU"
    return False, "a tenth of a step's time, and half a minute before the first"


def liger(hardware: Hardware) -> tuple[bool, str]:
    """training.use_liger_kernel."""
    if hardware.kind != "cuda":
        return False, "its kernels need a GPU"
    if not hardware.liger:
        return False, "not installed"
    return False, "not measured against lora's own loss"


def optimizer(hardware: Hardware, state: int, missing: int) -> tuple[str, str]:
    """training.optim, where fused AdamW's state has `state` bytes and the plan with it is `missing`
    bytes too large."""
    if hardware.kind == "cuda" and 0 < missing <= state * 3 // 4:
        return (
            "paged_adamw_8bit",
            f"saves {state * 3 / 4 / GIB:.1f} GiB, without which it does not fit",
        )
    return "adamw_torch_fused", "the fastest AdamW"


def measure_peak_memory() -> int:
    """Bytes that this process had at its highest: of CUDA's allocator where there is one, else
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
