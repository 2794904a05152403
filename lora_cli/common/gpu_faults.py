"""What keeps torch from a GPU, and what a GPU is too old for: in one message, with what to type.

torch says nothing where it was built for a GPU and finds none, and computes on the CPU. Where
somebody has a GPU or names one, that is a fault; elsewhere it is worth a line.
"""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from typing import NamedTuple

import torch

from lora_cli.common import ui
from lora_cli.common.errors import LoraError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable that says which of CUDA's GPUs a program sees."""
INDEX = "https://download.pytorch.org/whl"
ON_CPU = f"{VISIBLE}= trains on the CPU"
OLDEST_IN_4BIT = (6, 0)
"""The compute capability from which bitsandbytes has 4-bit kernels, as its documentation says."""
OLDEST_IN_CUDA_13 = (7, 5)
"""… and torch's builds for CUDA 12.8 and newer; those for CUDA 12.6 begin with 5.0. From the table
in torch/cuda/__init__.py, of version 2.13."""


class Fault(NamedTuple):
    """Why no GPU is used, and what to do about it."""

    said: str
    fix: str
    refused: bool = False
    """Whether there is a GPU that was meant to be used."""


def check_gpu(in_4bit: bool = False) -> None:
    """Refuse what a GPU here cannot do; say once why none is used, where one might expect it to.

    `in_4bit`: bitsandbytes' 4-bit weights are wanted. LoraError where a GPU is there, or named, and
    torch cannot use it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        fault = find_fault()
        if fault is not None and fault.refused:
            raise LoraError(fault.said, fault.fix)
        if fault is not None:
            _warn_once(f"{fault.said}: the CPU is used ({fault.fix})")
    elif accelerator.type == "cuda":
        refuse_old_card(torch.accelerator.current_device_index(), in_4bit)
    elif accelerator.type == "mps" and in_4bit:
        _warn_once(
            "4-bit weights were not tried on Apple's GPU: the CPU is used "
            "(--set method=lora, or dora, uses the GPU)"
        )


@cache
def _warn_once(said: str) -> None:
    ui.warn(said)


def find_fault() -> Fault | None:
    """Say why torch finds no GPU; None where it was built for CPUs and there is no driver."""
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return _find_unused_gpu()
    visible = os.environ.get(VISIBLE)
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return Fault(f"{VISIBLE} is empty", f"unset {VISIBLE}")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an AssertionError for a damaged torch
        return _explain(str(error), build, visible)
    return None


def _find_unused_gpu() -> Fault | None:
    """Return that a CPU build of torch stands beside an NVIDIA driver."""
    if torch.backends.mps.is_built() or shutil.which("nvidia-smi") is None:
        return None
    said = f"this torch ({torch.__version__}) is a CPU build, and there is an NVIDIA driver"
    return Fault(said, _install("cu130"))


def _explain(said: str, build: str, visible: str | None) -> Fault:
    """Say in other words what torch said when it could not start."""
    if "Found no NVIDIA driver" in said:
        fix = f"nvidia-smi finds none either? Without an NVIDIA GPU: {_install('cpu')}"
        return Fault(f"this torch is built for CUDA {build}, and there is no NVIDIA driver", fix)
    if found := re.search(r"too old \(found version (\d+)\)", said):
        number = int(found[1])
        driver = f"{number // 1000}.{number % 1000 // 10}"
        other = f"or {_install('cu126')}; " if number >= 12_000 else ""
        return Fault(
            f"the NVIDIA driver is too old: it knows CUDA {driver}, and this torch needs {build}",
            f"update the driver; {other}{ON_CPU}",
            refused=True,
        )
    if re.search(r"No (CUDA|HIP) GPUs are available", said) and visible is not None:
        fix = f"nvidia-smi -L lists them; {ON_CPU}"
        return Fault(f"{VISIBLE}={visible} names no GPU of this machine", fix, refused=True)
    if re.search(r"No (CUDA|HIP) GPUs are available", said):
        fix = "nvidia-smi lists what it finds; in a container: docker run --gpus all"
        return Fault("the driver finds no GPU", fix)
    line = " ".join(said.split())[:200]
    return Fault(f"the GPU cannot be used: {line}", f"nvidia-smi; {ON_CPU}", refused=True)


def _install(build: str) -> str:
    """Return the command that installs this version of torch for CUDA, or for CPUs."""
    version = torch.__version__.partition("+")[0]
    return f"pip install --force-reinstall torch=={version} --index-url {INDEX}/{build}"


def refuse_old_card(index: int, in_4bit: bool) -> None:
    """Raise LoraError for a GPU that this torch, or bitsandbytes, has no kernels for."""
    if torch.version.cuda is None:  # AMD's cards have other numbers
        return
    capability = torch.cuda.get_device_capability(index)
    card = f"{torch.cuda.get_device_name(index)} (compute capability {_dot(capability)})"
    built = torch.cuda.get_arch_list()
    if built and not any(_runs(each, capability) for each in built):
        fix = "pip install -U torch"
        if capability < OLDEST_IN_CUDA_13:
            fix = _install("cu126")
        elif torch.version.cuda.startswith("12."):
            fix = _install("cu130")
        raise LoraError(
            f"this torch has no kernels for {card}, but for {', '.join(built)}",
            f"{fix}; {ON_CPU}",
        )
    if in_4bit and capability < OLDEST_IN_4BIT:
        raise LoraError(
            f"bitsandbytes has no 4-bit kernels for {card}, but from {_dot(OLDEST_IN_4BIT)} on",
            f"--set method=lora; {ON_CPU}",
        )


def _dot(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _runs(built: str, capability: tuple[int, int]) -> bool:
    """Return whether code built for `sm_86`, or `compute_90`, runs on a card."""
    kind, _, number = built.partition("_")
    digits = re.match(r"\d+", number)
    if digits is None:
        return False
    version = divmod(int(digits[0]), 10)
    if number != digits[0]:  # sm_90a runs there alone
        return version == capability
    if kind == "compute":  # the driver compiles it for newer cards
        return version <= capability
    return version[0] == capability[0] and version[1] <= capability[1]


def describe_choice(device: torch.device) -> list[str]:
    """Say which of several visible GPUs is used, and how another one is chosen; no line where there
    is one only."""
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if count < 2:
        return []
    if device.type != "cuda":
        return [f"one of the {count} visible GPUs is used: {device}"]
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    lines = [f"one of the {count} visible GPUs is used: {device}, {names[device.index or 0]}"]
    visible = os.environ.get(VISIBLE, "").split(",")
    other = next((index for index in range(count) if index != device.index), 1)
    chosen = visible[other].strip() if len(visible) == count else other
    lines.append(f"  (another one: {VISIBLE}={chosen})")
    if len(set(names)) > 1 and "CUDA_DEVICE_ORDER" not in os.environ:
        lines.append(
            f"  (they differ: {', '.join(names)}; CUDA begins with the fastest. With "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID numbers are those that nvidia-smi shows)"
        )
    return lines
