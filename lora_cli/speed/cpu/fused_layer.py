"""An adapted linear layer as one operation: f (W x + s B A x̃) + b, with LoRA (f = 1) or DoRA,
dropout and 4-bit bases.

PEFT computes W x, then B A x̃ beside it, scales that and adds it: three tensors as large as the
output, which a CPU writes and reads one after the other, and DoRA and dropout add their own. Here
the one product adds to the other, in the backward pass too, f and b take one pass more, and kept
for the gradients are x, A x̃, where dropout left zeros, and for DoRA what f multiplies. What that
gains is in docs/benchmarks.md. On CUDA, compiling the layer does this. What a layer has beyond that
– several adapters, DoRA with dropout, types that differ – is PEFT's to compute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bitsandbytes import nn as bnb
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_cli.models import attach
from lora_cli.speed import dora_norms
from lora_cli.speed.cpu import dropout


class Frozen(NamedTuple):
    """A layer's weight, which is not trained, as a matrix (out × in) of type `dtype` when asked
    for."""

    weight: Tensor
    dtype: torch.dtype
    turned: bool
    """The weight is in × out."""
    state: QuantState | None
    """What bitsandbytes needs to read a 4-bit one."""

    def matrix(self) -> Tensor:
        """The weight; a 4-bit one's is made anew each time."""
        if self.state is None:
            return transpose(self.weight, self.turned)
        return dequantize_4bit(self.weight, self.state).to(self.dtype)


class _Adapted(torch.autograd.Function):
    """f (W x + s B A x̃) + b for x (… × in), with x̃ the x of which a share p is dropped, in the
    type of W.

    f = m / ‖W + s B A‖ of each row, the norm a constant, or 1 where there is no magnitude m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        magnitude: Tensor | None,
        base: Frozen,
        norms: dora_norms.FactoredDora | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        kind, weight, scale = base.dtype, base.matrix(), scaling / (1 - p)
        seen, first, second = x.to(kind), lora_A.to(kind), (lora_B * scale).to(kind)
        dropped = dropout.draw_positions(x.numel(), p) if p else None
        low = functional.linear(
            seen if dropped is None else dropout.drop_positions(seen, dropped), first
        )
        shift, kept = None if bias is None else bias.float(), (None, None, None)
        made = functional.linear(
            low, second, None if shift is None or norms is not None else shift.to(kind)
        )
        made.flatten(0, -2).addmm_(seen.flatten(0, -2), weight.T)
        given = made  # no view, and nothing that is kept: models add to it and clip it in place
        if norms is not None:
            found = norms.norms_now(lambda: weight, lora_A, lora_B, scaling)
            factor = norms.weight.float() / found
            given, kept = _scale_columns(made, factor, shift), (factor, found, made)
        ctx.save_for_backward(seen, low, first, second, dropped, *kept)
        ctx.given = x.dtype, lora_A.dtype, base, scale
        return given

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, first, second, dropped, factor, found, made = ctx.saved_tensors
        dtype, kind, base, scale = ctx.given
        gradient, rows = above[0].flatten(0, -2), seen.flatten(0, -2)
        by_x = by_bias = by_magnitude = None
        if ctx.needs_input_grad[3]:
            by_bias = gradient.sum(0, dtype=torch.float32).to(kind)
        if factor is not None:
            by_magnitude, gradient = (
                _sum_products(gradient, made) / found,
                _scale_columns(gradient, factor),
            )
        by_low = gradient @ second
        if ctx.needs_input_grad[0]:
            by_x = by_low @ first
            by_x = by_x if dropped is None else dropout.drop_positions(by_x, dropped)
            by_x = by_x.addmm_(gradient, base.matrix()).to(dtype).view_as(seen)
        rows = rows if dropped is None else dropout.drop_positions(rows, dropped)
        by_A, by_B = (
            (by_low.T @ rows).to(kind),
            (gradient.T @ low.flatten(0, -2)).to(kind).mul_(scale),
        )
        return by_x, by_A, by_B, by_bias, by_magnitude, None, None, None, None


def _scale_columns(x: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """f x + b for x (… × out), f and b (out, float32): in one pass, as batch norm does it where it
    trains nothing."""
    made, none = torch.empty_like(x), torch.empty(0)
    given = (
        factor,
        shift,
        torch.zeros_like(factor),
        torch.ones_like(factor),
    )  # mean and variance of the norm
    torch.native_batch_norm(
        _view_as_image(x), *given, False, 0.0, 0.0, out=(_view_as_image(made), none, none)
    )
    return made


def _sum_products(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum of g x over the rows (out, float32) for a gradient and an x (… × out): what that
    norm's factor learns."""
    zero = torch.zeros(x.shape[-1])
    given = (
        _view_as_image(gradient),
        _view_as_image(x),
        zero,
        zero,
        zero + 1,
        None,
        None,
        False,
        0.0,
        (False, True, False),
    )
    return torch.ops.aten.native_batch_norm_backward(*given)[1]


def _view_as_image(x: Tensor) -> Tensor:
    """… × out as one image of as many pixels and `out` channels, the channels last in memory."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


class _Fused:
    """The forward pass of an adapted layer, PEFT's own where it is more than this operation."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (… × out) for x (… × in), as PEFT's."""
        name, base = _find_single_adapter(self), _find_frozen(self, x)
        if name is None or base is None or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        drop, norms = self.lora_dropout[name], None
        p = drop.p if drop.training and not isinstance(drop, nn.Identity) else 0.0
        if name in self.lora_magnitude_vector:
            norms = self.lora_magnitude_vector[name]
            if p or not isinstance(norms, dora_norms.FactoredDora):
                return super().forward(x)  # type: ignore[misc]
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        bias, magnitude = self.get_base_layer().bias, None if norms is None else norms.weight
        return _Adapted.apply(x, first, second, bias, magnitude, base, norms, self.scaling[name], p)


class FusedLinear(_Fused, Linear):
    """PEFT's adapted linear layer, as one operation."""


class Fused4bit(_Fused, Linear4bit):
    """PEFT's adapted 4-bit layer, as one operation."""


def _find_single_adapter(layer: Any) -> str | None:
    """The adapter of a layer that has only this one, which is active and not merged; else None."""
    names = layer.active_adapters
    single = len(names) == 1 and list(layer.lora_A) == names
    return names[0] if single and not (layer.disable_adapters or layer.merged) else None


def _find_frozen(layer: Any, x: Tensor) -> Frozen | None:
    """The base of a layer; None where that and what it is given differ in type."""
    base = layer.get_base_layer()
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    packed = isinstance(base, bnb.Linear4bit)
    if (base.compute_dtype if packed else base.weight.dtype) != kind or (
        packed and x.dtype != kind
    ):
        return None
    return Frozen(
        base.weight, kind, layer.fan_in_fan_out, base.weight.quant_state if packed else None
    )


def install(adapted: PeftModel) -> int:
    """Let LoRA and DoRA on linear layers of a model on a CPU use it; returns how many layers do."""
    installed = 0
    for layer in attach.find_lora_layers(adapted).values():
        if type(layer) in (Linear, Linear4bit) and _suits(layer):
            layer.__class__ = FusedLinear if type(layer) is Linear else Fused4bit
            installed += 1
    return installed


def _suits(layer: Any) -> bool:
    """Whether a layer is a frozen weight on the CPU with LoRA or DoRA, which have no biases of
    their own."""
    base = layer.get_base_layer()
    if (
        type(base) not in (nn.Linear, Conv1D, bnb.Linear4bit)
        or base.weight.requires_grad
        or base.weight.device.type != "cpu"
    ):
        return False
    if layer.lora_variant.keys() - layer.lora_magnitude_vector.keys():
        return False
    return all(
        type(layer.lora_A[name]) is nn.Linear and layer.lora_B[name].bias is None
        for name in layer.lora_A
    )
