"""Capture and restore the random number generators that training draws from, as plain data.

They are Python's, numpy's, and torch's on the CPU and on the accelerator.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch

from lora_cli.common import devices, ui

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
    """Set every generator to its state. One of an accelerator that the state knows nothing of is
    seeded as the processor's was; it is said that the run cannot be the same from there on."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]["cpu"]))
    kind = _find_accelerator()
    if kind and kind in state["torch"]:
        torch.get_device_module(kind).set_rng_state(_tensor(state["torch"][kind]))
    elif kind:
        torch.get_device_module(kind).manual_seed(torch.initial_seed())
    if {*state["torch"], "cpu"} != {kind or "cpu", "cpu"}:
        _warn_of_other_device(" and ".join(sorted(state["torch"])), kind or "cpu")


@cache
def _warn_of_other_device(before: str, now: str) -> None:
    ui.warn(
        f"this run was on {before} and goes on on {now}: the steps are the same, but not the "
        "numbers that dropout draws, nor the order in which products are summed"
    )


def _find_accelerator() -> str | None:
    """Return the accelerator's kind as torch names it, such as `cuda`; None without one."""
    kind = devices.find_device().type
    return None if kind == "cpu" else kind


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
