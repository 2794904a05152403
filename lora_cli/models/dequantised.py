"""Read quantised weights from safetensors files as the plain ones they stand for: bitsandbytes'
4-bit ones, and FP8 with a scale per block.

bitsandbytes writes for `x.weight` its codes, and as `x.weight.…` their scales and a JSON text with
block size, type and shape. FP8 weights have their scales in `x.weight_scale_inv`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from lora_cli.common import LoraError, files
from lora_cli.models.quantised import Quantised
from lora_cli.models.tensors import Entry, Tensors

STATE = ".quant_state.bitsandbytes__"
SCALE = "_scale_inv"
UNUSED = "activation_scale"
"""Of the inputs of FP8 weights' products, not of the weights."""


def read_dequantised(stored: Tensors, quantised: Quantised) -> Tensors:
    """Return the tensors of files that keep weights `quantised`, as they dequantise; as they are
    stored where that is not known here."""
    if quantised.in_4bit:
        return FourBit(stored)
    return Float8(stored, quantised) if quantised.method in ("fp8", "mxfp8") else stored


class Dequantised(Tensors):
    """Tensors of which some are dequantised as they are read."""

    def __init__(self, stored: Tensors) -> None:
        self.stored, self.paths = stored, stored.paths
        self.entries: dict[str, Entry] = {}
        self._kept = threading.local()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `start` to `stop`, a new tensor of the type in `entries`."""
        if name in self.stored.entries and self.entries[name] == self.stored.entries[name]:
            return self.stored.rows(name, start, stop)
        kept = self._kept
        if getattr(kept, "name", None) != name:  # until the thread asks for another
            kept.name, kept.tensor = None, None
            kept.tensor = self.dequantise(name)
            kept.name = name
        return kept.tensor[start:stop].clone()

    def dequantise(self, name: str) -> torch.Tensor:
        """Return a whole tensor that is stored quantised."""
        raise NotImplementedError


class FourBit(Dequantised):
    """bitsandbytes' 4-bit weights, in the type that they were quantised from."""

    def __init__(self, stored: Tensors) -> None:
        super().__init__(stored)
        self.parts: dict[str, list[str]] = {
            name.partition(STATE)[0]: [] for name in stored.entries if STATE in name
        }
        for name, entry in stored.entries.items():
            owner = name.partition(STATE)[0] if STATE in name else name.rpartition(".")[0]
            if owner in self.parts:
                self.parts[owner].append(name)
            else:
                self.entries[name] = entry
        for name in self.parts:
            self.entries[name] = self._read_entry(name)

    def _read_entry(self, name: str) -> Entry:
        """Read the type and shape of a weight from the text beside it."""
        text = next(part for part in self.parts[name] if STATE in part)
        try:
            state: dict[str, Any] = files.parse_json(self.stored.rows(text).numpy().tobytes(), text)
            made = self.stored.entries[name]._replace(
                dtype=getattr(torch, state["dtype"]), shape=tuple(state["shape"])
            )
            codes = self.stored.entries[name]
            wrong = math.prod(made.shape) != 2 * codes.dtype.itemsize * math.prod(codes.shape)
            wrong = wrong or not isinstance(made.dtype, torch.dtype)
        except (LoraError, ValueError, KeyError, TypeError, AttributeError):
            wrong = True
        if wrong:
            raise LoraError(
                f"{self.stored.entries[text].file}: {text} does not describe 4-bit weights",
                "copy or download it again",
            )
        return made

    def dequantise(self, name: str) -> torch.Tensor:
        """Return a weight by bitsandbytes' own arithmetic, as one row: some processors' kernels
        misread rows of some lengths."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {part: self.stored.rows(part) for part in self.parts[name]}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        shape = self.entries[name].shape
        state.shape = torch.Size([1, math.prod(shape)])
        codes = self.stored.rows(name).flatten().view(torch.uint8)[:, None]
        return dequantize_4bit(codes, state).reshape(shape)


class Float8(Dequantised):
    """FP8 weights times the scales of their blocks, in float32, as transformers' `Fp8Dequantize`
    computes them before it rounds to the type of the model."""

    def __init__(self, stored: Tensors, quantised: Quantised) -> None:
        super().__init__(stored)
        self.block: Sequence[int] = quantised.settings.get("weight_block_size") or (1, 1)
        for name, entry in stored.entries.items():
            if name.endswith((SCALE, UNUSED)):
                continue
            scaled = f"{name}{SCALE}" in stored.entries
            self.entries[name] = entry._replace(dtype=torch.float32) if scaled else entry

    def dequantise(self, name: str) -> torch.Tensor:
        """Return a weight in float32."""
        weight = self.stored.rows(name).float()
        scales = self.stored.rows(f"{name}{SCALE}")
        if scales.dtype == torch.uint8:  # the exponents of powers of two
            scales = (scales.float() - 127).exp2()
        scales = scales.float()
        if scales.numel() == 1:
            return weight * scales
        for dim, size in ((-2, weight.shape[-2]), (-1, weight.shape[-1])):
            grid = scales.shape[dim]
            each = size // grid if size % grid == 0 else self.block[dim]
            scales = scales.repeat_interleave(each, dim).narrow(dim, 0, size)
        return weight * scales
