"""Capture and restore the random number generators that training draws from, as plain data.

They are Python's, numpy's, and torch's on the CPU and on the accelerator.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from transformers import set_seed

from lora_cli.common import devices, stored, ui
from lora_cli.distributed import ranks

Word = Annotated[int, Field(ge=0, lt=2**32)]


class State(stored.Stored):
    """The generators' states as lists, numbers and hexadecimal digits, which JSON holds exactly.

    Each has been tried: the generators take it.
    """

    python: tuple[Literal[3], tuple[Word, ...], float | None]
    numpy: tuple[
        Literal["MT19937"],
        Annotated[list[Word], Field(min_length=624, max_length=624)],
        Annotated[int, Field(ge=0, le=624)],  # numpy would read behind its numbers
        Literal[0, 1],
        float,
    ]
    torch: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{2})*\z")]]

    @model_validator(mode="after")
    def _try(self) -> Self:
        known = {kind: digits for kind, digits in self.torch.items() if kind in _list_kinds()}
        if "cpu" not in known:
            raise ValueError("torch has no state of the processor's generator")
        try:
            random.Random().setstate(self.python)
            for kind, digits in known.items():
                torch.Generator(kind).set_state(_tensor(digits))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"no generator takes it: {error}") from None
        return self


def capture_state() -> State:
    """Return the generators' states."""
    name, keys, *more = np.random.get_state()
    states = {"cpu": _hex(torch.get_rng_state())}
    if kind := _find_accelerator():
        states[kind] = _hex(torch.get_device_module(kind).get_rng_state())
    of_numpy: Any = (name, np.asarray(keys).tolist(), *more)
    return State(python=random.getstate(), numpy=of_numpy, torch=states)


def seed_apart(seed: int) -> None:
    """Seed the generators, so that processes that train together drop other values each."""
    set_seed(seed + ranks.number())


def restore_state(state: State) -> None:
    """Set every generator to its state. One of an accelerator that the state knows nothing of is
    seeded as the processor's was; it is said that the run cannot be the same from there on."""
    random.setstate(state.python)
    name, keys, position, has_gauss, cached = state.numpy
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state.torch["cpu"]))
    kind = _find_accelerator()
    if kind and kind in state.torch:
        torch.get_device_module(kind).set_rng_state(_tensor(state.torch[kind]))
    elif kind:
        torch.get_device_module(kind).manual_seed(torch.initial_seed())
    if {*state.torch, "cpu"} != {kind or "cpu", "cpu"}:
        _warn_of_other_device(" and ".join(sorted(state.torch)), kind or "cpu")


@cache
def _warn_of_other_device(before: str, now: str) -> None:
    ui.warn(
        f"this run was on {before} and goes on on {now}: the steps are the same, but not the "
        "numbers that dropout draws, nor the order in which products are summed"
    )


def _list_kinds() -> list[str]:
    """List the kinds of devices that there is a generator for."""
    return ["cpu", *filter(None, [_find_accelerator()])]


def _find_accelerator() -> str | None:
    """Return the accelerator's kind as torch names it, such as `cuda`; None without one."""
    kind = devices.find_device().type
    return None if kind == "cpu" else kind


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
