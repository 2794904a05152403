"""Compute an adapted layer as one operation: f (W x + s B A x̃) + b, with LoRA (f = 1) or DoRA,
dropout and 4-bit bases.

PEFT computes W x, then B A x̃ beside it, scales that and adds it: three tensors as large as the
output, which a CPU writes and reads one after the other, and DoRA and dropout add their own. Here
one product is added to the other, in the backward pass too, and f and b take one more pass. Kept
for the gradients are x, A x̃, the positions where dropout put zeros, and for DoRA what f
multiplies. docs/benchmarks.md has what that gains. On CUDA, compiling the layer does this. PEFT
computes what a layer has beyond that: several adapters, DoRA with dropout, types that differ.
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
    """A layer's weight, which is not trained, readable as a matrix (out × in) of type `dtype`."""

    weight: Tensor
    dtype: torch.dtype
    turned: bool
    """Whether the weight is stored as in × out."""
    state: QuantState | None
    """What bitsandbytes needs to read a 4-bit weight."""

    def read_matrix(self) -> Tensor:
        """Return the weight; a 4-bit one is dequantised anew each time."""
        if self.state is None:
            return transpose(self.weight, self.turned)
        return dequantize_4bit(self.weight, self.state).to(self.dtype)


class _Adapted(torch.autograd.Function):
    """f (W x + s B A x̃) + b for x (… × in), where x̃ is x with a share p dropped, in the type of
    W.

    f = m / ‖W + s B A‖ of each row, the norm a constant; f is 1 where there is no magnitude m.
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
        kind = base.dtype
        weight = base.read_matrix()
        scale = scaling / (1 - p)
        seen = x.to(kind)
        first = lora_A.to(kind)
        second = (lora_B * scale).to(kind)
        dropped = dropout.draw_positions(x.numel(), p) if p else None
        # inside the call, so that what is left of x is freed before the output is made
        low = functional.linear(
            seen if dropped is None else dropout.drop_positions(seen, dropped), first
        )
        shift = None if bias is None else bias.float()
        added_here = None if shift is None or norms is not None else shift.to(kind)
        made = functional.linear(low, second, added_here)
        made.flatten(0, -2).addmm_(seen.flatten(0, -2), weight.T)
        # models add to what they get and clip it in place: it must not be a view, or kept
        given = made
        kept: tuple[Tensor | None, ...] = (None, None, None)
        if norms is not None:
            found = norms.get_norms(lambda: weight, lora_A, lora_B, scaling)
            factor = norms.weight.float() / found
            given = _scale_columns(made, factor, shift)
            kept = (factor, found, made)
        ctx.save_for_backward(seen, low, first, second, dropped, *kept)
        ctx.given = x.dtype, lora_A.dtype, base, scale
        return given

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, first, second, dropped, factor, found, made = ctx.saved_tensors
        dtype, kind, base, scale = ctx.given
        gradient = above[0].flatten(0, -2)
        rows = seen.flatten(0, -2)
        by_x = by_bias = by_magnitude = None
        if ctx.needs_input_grad[3]:
            by_bias = gradient.sum(0, dtype=torch.float32).to(kind)
        if factor is not None:
            by_magnitude = _sum_products(gradient, made) / found
            gradient = _scale_columns(gradient, factor)
        by_low = gradient @ second
        if ctx.needs_input_grad[0]:
            by_x = by_low @ first
            by_x = by_x if dropped is None else dropout.drop_positions(by_x, dropped)
            by_x = by_x.addmm_(gradient, base.read_matrix()).to(dtype).view_as(seen)
        rows = rows if dropped is None else dropout.drop_positions(rows, dropped)
        by_A = (by_low.T @ rows).to(kind)
        by_B = (gradient.T @ low.flatten(0, -2)).to(kind).mul_(scale)
        return by_x, by_A, by_B, by_bias, by_magnitude, None, None, None, None


def _scale_columns(x: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return f x + b for x (… × out), f and b (out, float32), in one pass: batch norm with fixed
    statistics does that."""
    made = torch.empty_like(x)
    none = torch.empty(0)
    mean, variance = torch.zeros_like(factor), torch.ones_like(factor)
    out = (_view_as_image(made), none, none)
    torch.native_batch_norm(
        _view_as_image(x), factor, shift, mean, variance, False, 0.0, 0.0, out=out
    )
    return made


def _sum_products(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the sum of g x over the rows (out, float32) for a gradient and an x (… × out): the
    gradient of that norm's factor."""
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
    """Return … × out as one image of as many pixels and `out` channels, the channels last in
    memory."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


class _Fused:
    """The forward pass of an adapted layer; PEFT's own where the layer is more than this
    operation."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (… × out) for x (… × in), as PEFT's does."""
        name = _find_single_adapter(self)
        base = _find_frozen(self, x)
        if name is None or base is None or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        drop = self.lora_dropout[name]
        norms = None
        p = drop.p if drop.training and not isinstance(drop, nn.Identity) else 0.0
        if name in self.lora_magnitude_vector:
            norms = self.lora_magnitude_vector[name]
            if p or not isinstance(norms, dora_norms.FactoredDora):
                return super().forward(x)  # type: ignore[misc]
        first = self.lora_A[name].weight
        second = self.lora_B[name].weight
        bias = self.get_base_layer().bias
        magnitude = None if norms is None else norms.weight
        return _Adapted.apply(x, first, second, bias, magnitude, base, norms, self.scaling[name], p)


class FusedLinear(_Fused, Linear):
    """PEFT's adapted linear layer, as one operation."""


class Fused4bit(_Fused, Linear4bit):
    """PEFT's adapted 4-bit layer, as one operation."""


def _find_single_adapter(layer: Any) -> str | None:
    """Return the adapter of a layer if it is the only one, active and not merged; else None."""
    names = layer.active_adapters
    single = len(names) == 1 and list(layer.lora_A) == names
    return names[0] if single and not (layer.disable_adapters or layer.merged) else None


def _find_frozen(layer: Any, x: Tensor) -> Frozen | None:
    """Return the base of a layer, or None where its type differs from its input's."""
    base = layer.get_base_layer()
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    packed = isinstance(base, bnb.Linear4bit)
    own = base.compute_dtype if packed else base.weight.dtype
    if own != kind or (packed and x.dtype != kind):
        return None
    state = base.weight.quant_state if packed else None
    return Frozen(base.weight, kind, layer.fan_in_fan_out, state)


def install(adapted: PeftModel) -> int:
    """Let LoRA and DoRA on linear layers of a model on a CPU use it; return how many layers do."""
    installed = 0
    for layer in attach.find_lora_layers(adapted).values():
        if type(layer) in (Linear, Linear4bit) and _is_suitable(layer):
            layer.__class__ = FusedLinear if type(layer) is Linear else Fused4bit
            installed += 1
    return installed


def _is_suitable(layer: Any) -> bool:
    """Return whether a layer is a frozen weight on the CPU, with LoRA or DoRA that do not have
    biases of their own."""
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
