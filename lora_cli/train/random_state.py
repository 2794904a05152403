"""Capture and restore the random number generators that training draws from, as plain data.

They are Python's, numpy's, and torch's on the CPU and on the accelerator.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lora_cli.common import devices

State = dict[str, Any]


def capture_state() -> State:
    """Return the generators' states as lists, numbers and hexadecimal digits, which JSON holds
    exactly."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: State = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": {"cpu": _hex(torch.get_rng_state())},
    }
    if kind := _find_accelerator():
        state["torch"][kind] = _hex(torch.get_device_module(kind).get_rng_state())
    return state


def restore_state(state: State) -> None:
    """Set every generator to its state. KeyError for a state from another kind of device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]["cpu"]))
    if kind := _find_accelerator():
        torch.get_device_module(kind).set_rng_state(_tensor(state["torch"][kind]))


def _find_accelerator() -> str | None:
    """Return the accelerator's kind as torch names it, such as `cuda`; None without one."""
    kind = devices.find_device().type
    return None if kind == "cpu" else kind


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
