"""The device that models train and answer on: the one place that names it."""

from __future__ import annotations

import torch


def find_device(in_4bit: bool = False, use_cpu: bool = False) -> torch.device:
    """Find the accelerator that is here, or the processor where there is none or `use_cpu`.

    Of several, it is the current one: the first, unless CUDA_VISIBLE_DEVICES says otherwise. A
    torch that was built for one that is absent does not count. `in_4bit`: where bitsandbytes'
    4-bit weights are computed, which is not Apple's GPU: bitsandbytes 0.50 has operations for it,
    but no part of lora was run with them.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or use_cpu or (in_4bit and found.type == "mps"):
        return torch.device("cpu")
    if found.type == "mps":  # there is one at most, and Trainer does not number it
        return found
    return torch.device(found.type, torch.accelerator.current_device_index())
