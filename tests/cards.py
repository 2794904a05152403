"""GPUs that are not here: torch is told what there is. The one place that tells it."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import pytest
import torch

from lora_cli.common import gpu_faults

# As libtorch says it (c10/cuda/CUDAFunctions.cpp); torch.cuda.init() raises RuntimeError with it.
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and "
    "installed a driver from http://www.nvidia.com/Download/index.aspx"
)
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version {version}). Please update your "
    "GPU driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to "
    "install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_GPU = "No CUDA GPUs are available"
WHEEL_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""What torch's wheel for CUDA 13.0 is built for."""


class Machine(NamedTuple):
    """What torch finds."""

    kind: str | None = None
    """Of the accelerator that is there; None where there is none."""
    fault: str | None = None
    """What torch.cuda.init() raises."""
    cuda: str | None = "13.0"
    """The CUDA that torch was built for; None for a CPU build."""
    names: tuple[str, ...] = ("NVIDIA H100 80GB HBM3",)
    capability: tuple[int, int] = (9, 0)
    built: tuple[str, ...] = WHEEL_13
    index: int = 0
    driver: bool = False
    """Whether nvidia-smi is there."""


def pretend(patch: pytest.MonkeyPatch, kind: str | None, index: int = 0) -> None:
    """Let this machine have an accelerator; None: a torch that was built for one that is absent."""
    pretend_machine(patch, Machine(kind, NO_DRIVER, index=index))


def pretend_machine(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Let torch find what `machine` says."""

    def find(check_available: bool = False) -> torch.device | None:
        if machine.kind:
            return torch.device(machine.kind)
        return None if check_available or machine.cuda is None else torch.device("cuda")

    def init() -> None:
        if machine.fault is not None:
            raise RuntimeError(machine.fault)

    told: dict[str, Any] = {
        "get_device_capability": machine.capability,
        "get_arch_list": list(machine.built),
    }
    for name, value in told.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    patch.setattr(torch.cuda, "get_device_name", lambda index=0: machine.names[index or 0])
    patch.setattr(torch.cuda, "init", init)
    patch.setattr(torch.version, "cuda", machine.cuda)
    patch.setattr(torch.accelerator, "current_accelerator", find)
    patch.setattr(torch.accelerator, "current_device_index", lambda: machine.index)
    patch.setattr(torch.accelerator, "device_count", lambda: len(machine.names))
    which = shutil.which
    found = "/usr/bin/nvidia-smi" if machine.driver else None
    patch.setattr(
        shutil,
        "which",
        lambda name, *a, **k: found if name == "nvidia-smi" else which(name, *a, **k),
    )
    gpu_faults._warn_once.cache_clear()
