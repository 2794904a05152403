"""Weights that an operation reads from the files when it comes to them.

A module's forward may use the weights of another, as Mamba's does with its convolution's. On a
tensor without data torch would refuse that, or, in a convolution, compute from whatever is in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

SHAPE_ONLY = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.is_meta.__get__,
    torch.Tensor.grad_fn.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
}
"""What is asked of a tensor that its data does not tell."""


class Unread(torch.Tensor):
    """A tensor of the `meta` device in whose place every operation gets what `read()` returns."""

    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(like: torch.Tensor, read: Callable[[], torch.Tensor]) -> Unread:
        """Make one with the shape and type of `like`, which counts as a parameter where `like` is
        one."""
        made = torch.Tensor._make_subclass(Unread, like.detach())
        made.read = read
        made._is_param = isinstance(like, nn.Parameter)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SHAPE_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Unread, lambda given: given.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


@contextmanager
def replace_meta(model: nn.Module, read: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put an `Unread` in the place of every tensor of the `meta` device while the block runs;
    `read(tensor)` returns its data."""
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in list(held.items()):
                if tensor is not None and tensor.is_meta:
                    replaced.append((held, leaf, tensor))
                    held[leaf] = Unread.of(tensor, partial(read, tensor))
    try:
        yield
    finally:
        for held, leaf, tensor in replaced:
            held[leaf] = tensor
