"""Compute an adapted layer as one operation: f (W x + s B A x̃) + b, with LoRA (f = 1) or DoRA,
dropout and 4-bit bases.

PEFT computes W x, then B A x̃ beside it, scales that and adds it: three tensors as large as the
output, which a CPU writes and reads one after the other, and DoRA and dropout add their own. Here
one product is added to the other, in the backward pass too, and f and b take one more pass. Kept
for the gradients are x, A x̃, where dropout put zeros, and for DoRA what f multiplies.
docs/explanation/benchmarks.md has what that gains; on an H100 a step of a 1B Llama takes 0.74
of the time.
PEFT computes what a layer has beyond that: several adapters, DoRA with dropout, types that differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes import nn as bnb
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_cli.models import attach
from lora_cli.speed import dora_norms
from lora_cli.speed.cpu import columns, dropout

AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Kinds of device that know autocast; torch's own question for it cannot be compiled."""
SUMMED = 1 << 26
"""How many products are in float32 at a time before they are summed, where torch makes them."""


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

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b for x (… × in), of its type. Of a 4-bit weight, bitsandbytes chooses
        whether it is dequantised first."""
        if self.state is None:
            return functional.linear(x, self.read_matrix(), bias)
        return matmul_4bit(x, self.weight, self.state, bias=bias)


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
        one_pass: bool,
    ) -> Tensor:
        kind = base.dtype
        scale = scaling / (1 - p)
        seen = x.to(kind)
        first = lora_A.to(kind)
        second = torch.mul(lora_B, scale, out=torch.empty_like(lora_B, dtype=kind))
        dropped = _draw_dropped(x, p, one_pass)
        # inside the call, so that what is left of x is freed before the output is made
        low = functional.linear(_drop(seen, dropped), first)
        shift = None if bias is None else bias.float()
        added_here = None if shift is None or norms is not None else shift.to(kind)
        made = _sum_both(base, seen, second, low, added_here, one_pass)
        # models add to what they get and clip it in place: it must not be kept, or a view, which
        # torch makes of a product with a bias
        given = torch.ops.aten._unsafe_view(made, made.shape)
        kept: tuple[Tensor | None, ...] = (None, None, None)
        if norms is not None:
            found = norms.get_norms(base.read_matrix, lora_A, lora_B, scaling)
            factor = norms.weight.float() / found
            given = _scale_columns(made, factor, shift, one_pass)
            kept = (factor, found, made)
        ctx.save_for_backward(seen, low, first, second, dropped, *kept)
        ctx.given = x.dtype, lora_A.dtype, base, scale, one_pass
        return given

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, first, second, dropped, factor, found, made = ctx.saved_tensors
        dtype, kind, base, scale, one_pass = ctx.given
        gradient = above[0].flatten(0, -2)
        rows = seen.flatten(0, -2)
        by_x = by_bias = by_magnitude = None
        if ctx.needs_input_grad[3]:
            by_bias = gradient.sum(0, dtype=torch.float32).to(kind)
        if factor is not None:
            by_magnitude = _sum_products(gradient, made.flatten(0, -2), one_pass) / found
            gradient = _scale_columns(gradient, factor, None, one_pass)
        by_low = gradient @ second
        if ctx.needs_input_grad[0]:
            by_x = _drop(by_low @ first, dropped)
            by_x = by_x.addmm_(gradient, base.read_matrix()).to(dtype).view_as(seen)
        by_A = _multiply(by_low.T, _drop(rows, dropped), kind)
        by_B = _multiply(gradient.T, low.flatten(0, -2), kind).mul_(scale)
        return by_x, by_A, by_B, by_bias, by_magnitude, None, None, None, None, None


def _sum_both(
    base: Frozen, x: Tensor, second: Tensor, low: Tensor, bias: Tensor | None, one_pass: bool
) -> Tensor:
    """Return W x + B y + b (… × out) for x (… × in) and y = `low` (… × rank), one product added to
    the other."""
    if one_pass:
        made = functional.linear(low, second, bias)
        made.flatten(0, -2).addmm_(x.flatten(0, -2), base.read_matrix().T)
        return made
    made = base.multiply(x, bias)
    made.flatten(0, -2).addmm_(low.flatten(0, -2), second.T)
    return made


def _multiply(left: Tensor, right: Tensor, kind: torch.dtype) -> Tensor:
    """Return a product of type `kind`, which on a CUDA GPU is not rounded to the factors' first."""
    if left.is_cuda and kind == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=kind)
    return (left @ right).to(kind)


def _scale_columns(x: Tensor, factor: Tensor, shift: Tensor | None, one_pass: bool) -> Tensor:
    """Return f x + b of x's type, for x (… × out), f and b (out, float32)."""
    if one_pass:
        return columns.scale_columns(x, factor, shift)
    made = torch.mul(x, factor, out=torch.empty_like(x))
    return made if shift is None else made.add_(shift)


def _sum_products(gradient: Tensor, x: Tensor, one_pass: bool) -> Tensor:
    """Return the sum of g x over the rows (out, float32), for g, x (rows × out): what f learns."""
    if one_pass:
        return columns.sum_products(gradient, x)
    rows = max(1, SUMMED // x.shape[-1])
    parts = zip(gradient.split(rows), x.split(rows))
    sums = [(some.float() * others).sum(0) for some, others in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _draw_dropped(x: Tensor, p: float, one_pass: bool) -> Tensor | None:
    """Draw which elements of x are dropped: their positions on a CPU, else a mask as large as x."""
    if not p:
        return None
    if one_pass:
        return dropout.draw_positions(x.numel(), p)
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p)


def _drop(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Return x with zeros where `dropped` says; x itself where nothing is dropped."""
    if dropped is None:
        return x
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped.view(x.shape), 0)
    return dropout.drop_positions(x, dropped)


class _Fused:
    """The forward pass of an adapted layer; PEFT's own where the layer is more than this
    operation."""

    one_pass: bool
    """Whether `speed.cpu` does in one pass what takes torch several: on a CPU."""

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
        scaling, one_pass = self.scaling[name], self.one_pass
        return _Adapted.apply(x, first, second, bias, magnitude, base, norms, scaling, p, one_pass)


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
    base, kind, device = layer.get_base_layer(), x.dtype, x.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    packed = isinstance(base, bnb.Linear4bit)
    own = base.compute_dtype if packed else base.weight.dtype
    if own != kind or (packed and x.dtype != kind):
        return None
    if packed:  # a weight that was gathered is not the one that was quantised
        fix_4bit_weight_quant_state_from_module(base)
    state = base.weight.quant_state if packed else None
    return Frozen(base.weight, kind, layer.fan_in_fan_out, state)


def install(adapted: PeftModel, device: str) -> int:
    """Let LoRA and DoRA on linear layers of a model that trains on `device`, as torch names its
    kind, use it; return how many layers do."""
    installed = 0
    for layer in attach.find_lora_layers(adapted).values():
        if type(layer) in (Linear, Linear4bit) and _is_suitable(layer):
            layer.__class__ = FusedLinear if type(layer) is Linear else Fused4bit
            layer.one_pass = device == "cpu"
            installed += 1
    return installed


def _is_suitable(layer: Any) -> bool:
    """Return whether a layer is a frozen weight with LoRA or DoRA that do not have biases of their
    own."""
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D, bnb.Linear4bit) or base.weight.requires_grad:
        return False
    if layer.lora_variant.keys() - layer.lora_magnitude_vector.keys():
        return False
    return all(
        type(layer.lora_A[name]) is nn.Linear and layer.lora_B[name].bias is None
        for name in layer.lora_A
    )
