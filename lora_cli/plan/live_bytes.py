"""Which bytes are alive when, as a network runs on torch's fake tensors.

These have shapes, types and lifetimes but no content, and every storage is counted from when it is
made until it is freed.

A fake tensor cannot show memory that a kernel takes and gives back inside one operation. One such
case is known and added: the weight that a product with a 4-bit one dequantises.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import Any, NamedTuple

import bitsandbytes  # noqa: F401 - its import registers gemm_4bit
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS = "weights"
ADAPTERS = "adapters"
OPTIMIZER = "optimizer"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
HEAD = "head and loss"
BACKWARD = "backward pass"
ITEMS = (WEIGHTS, ADAPTERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, HEAD, BACKWARD)
GROUPED = torch.ops.aten._grouped_mm.default
GEMM_4BIT = torch.ops.bitsandbytes.gemm_4bit.default
LARGE = 32 << 20
"""Bytes from which glibc gives memory back as soon as it is freed."""


class Peaks(NamedTuple):
    """Bytes by item, each field at the moment when its sum is highest."""

    all: Counter[str]
    small: Counter[str]
    """Storages of less than `LARGE` bytes."""
    large: Counter[str]


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that operations inside make, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.item = WEIGHTS
        """What new storages count as."""
        self.now = Peaks(Counter(), Counter(), Counter())
        """Bytes that are alive."""
        self.most = Peaks(Counter(), Counter(), Counter())
        """The highest of each field so far."""
        self.owner: dict[int, tuple[str, int]] = {}
        """The item and the bytes of each storage."""
        self.operations = 0
        """Of the step that is rehearsed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func is GROUPED and args[0].dtype == torch.float32:
            # torch's fake version of this operation takes bfloat16 only
            first, second, *others = args
            made = func(first.bfloat16(), second.bfloat16(), *others, **(kwargs or {})).float()
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        inside = math.prod(args[2]) * args[0].element_size() if func is GEMM_4BIT else 0
        self._add(self.item, inside)
        for now, most in zip(self.now, self.most):
            if now.total() > most.total():
                most.clear()
                most.update(now)
        self._add(self.item, -inside)
        return made

    def _add(self, item: str, change: int) -> None:
        """Add the bytes of a new storage, or, below zero, take off those of one that is freed."""
        self.now.all[item] += change
        (self.now.small if abs(change) < LARGE else self.now.large)[item] += change

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.owner:
            self.owner[key] = (self.item, storage.nbytes())
            self._add(self.item, storage.nbytes())
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        item, size = self.owner.pop(key)
        self._add(item, -size)

    def reassign(self, tensor: torch.Tensor, item: str) -> None:
        """Count a tensor's storage as another item from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self.owner[key]
        self.owner[key] = (item, size)
        self._add(before, -size)
        self._add(item, size)

    def reset_peaks(self) -> None:
        """Look for new peaks, from now on."""
        for most in self.most:
            most.clear()
