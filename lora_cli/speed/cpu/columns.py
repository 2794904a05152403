"""Products with one number for each column, in one pass on a CPU: those of batch norm.

torch has no operation that multiplies a bfloat16 tensor by a float32 row and adds another without
first making a float32 tensor of it all. Batch norm in evaluation does: with mean 0 and variance 1
it is f x + b, and its gradient with respect to f is the sum of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_columns(x: Tensor, factor: Tensor, shift: Tensor | None) -> Tensor:
    """Return f x + b of x's type, for x (… × out), f and b (out, float32)."""
    made, none = torch.empty_like(x), torch.empty(0)
    mean, variance = torch.zeros_like(factor), torch.ones_like(factor)
    torch.native_batch_norm(
        _view_as_image(x),
        factor,
        shift,
        mean,
        variance,
        False,
        0.0,
        0.0,
        out=(_view_as_image(made), none, none),
    )
    return made


def sum_products(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the sum of g x over the rows (out, float32), for g and x (… × out)."""
    mean = torch.zeros(x.shape[-1])
    _, summed, _ = torch.ops.aten.native_batch_norm_backward(
        _view_as_image(gradient),
        _view_as_image(x),
        mean,
        mean,
        torch.ones_like(mean),
        None,
        None,
        False,
        0.0,
        (False, True, False),
    )
    return summed


def _view_as_image(x: Tensor) -> Tensor:
    """View … × out as one image with `out` channels, the channels last in memory."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
