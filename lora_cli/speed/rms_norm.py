"""Compute RMS norms in half the passes, on a CUDA GPU in one: w · x / √(mean(x²) + ε), with the
gradient written out.

Llama's norm is six operations, each with one or two of its own in the backward pass, for which it
keeps x in float32. Here the output is made by the same operations on the same tensors, and so is
equal bit for bit on any processor, and the gradient with respect to x in float32 from only x as it
came and 1 / √(mean(x²) + ε). (A step of a Llama of width 320, bfloat16, one thread: 0.93 of the
time.) On CUDA torch has a kernel for either way, which rounds once where Llama's rounds twice.
Families that compute theirs differently keep it: `install` compares both on numbers of its own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

aten = torch.ops.aten


class _Normed(torch.autograd.Function):
    """w x / √(mean(x²) + ε) over the last axis of x (… × width), for a w (width) that is not
    trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if x.is_cuda and x.dtype == weight.dtype:
            made, inverse = aten._fused_rms_norm(x, weight.shape, weight, epsilon)
            ctx.save_for_backward(x, inverse, weight)
            return made
        whole = x.float()
        inverse = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, inverse, weight)
        return weight * (whole * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        if x.is_cuda and x.dtype == weight.dtype:
            given = (above[0], x, weight.shape, inverse, weight, [True, False])
            return aten._fused_rms_norm_backward(*given)[0], None, None
        normed = x.float() * inverse
        gradient = (above[0] * weight).float()
        along = (gradient * normed).mean(-1, keepdim=True)
        return gradient.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), None, None


def forward(module: Any, x: Tensor) -> Tensor:
    """Return what the module's own forward returns."""
    return _Normed.apply(x, module.weight, _get_epsilon(module))


def _get_epsilon(module: nn.Module) -> Any:
    """Return ε, by the names that the families' norms give it."""
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def install(network: nn.Module) -> int:
    """Let the RMS norms of a model that are not trained use it; return how many do."""
    installed = 0
    for module in network.modules():
        theirs = type(module).__module__.startswith("liger_kernel") or "forward" in vars(module)
        if type(module).__name__.endswith("RMSNorm") and not theirs and _is_suitable(module):
            module.forward = MethodType(forward, module)
            installed += 1
    return installed


def _is_suitable(module: nn.Module) -> bool:
    """Return whether the module is no more than an untrained weight and ε, and its own forward
    gives the same bits."""
    weights = dict(module.named_parameters())
    alone = weights.keys() == {"weight"} and not list(module.named_buffers())
    if not alone or not isinstance(_get_epsilon(module), float):
        return False
    (weight,) = weights.values()
    if weight.ndim != 1 or weight.requires_grad:
        return False
    angles = torch.arange(8 * len(weight), dtype=torch.float32).view(8, -1) * 1.7
    x = angles.sin().to(weight.dtype)
    some = angles[0].cos().to(weight.dtype)
    theirs = functional_call(module, {"weight": some}, (x,))
    return torch.equal(theirs, _Normed.apply(x, some, _get_epsilon(module)))
