"""DoRA without the full product: the norm of W + sBA from products of the adapter's rank, once per optimiser step.

DoRA divides by the norm of each row of W + sBA in every forward pass. PEFT makes BA for that, as large as W. But

    ‖w + s b A‖² = ‖w‖² + 2s ⟨b, A w⟩ + s² b (A Aᵀ) bᵀ        for a row w of W and the same row b of B

needs A Wᵀ (rank × out) and A Aᵀ (rank × rank) only, and ‖w‖² once, as W is not trained. As in the paper (section 4.3)
and in PEFT, the norm is a constant to the gradient. Sums are in float32; what PEFT rounds to 16 bits is not here.
Within `norms_kept` the norms are computed once, for A and B stay as they are until the optimiser's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional

from lora_cli import model


class FactoredDora(DoraLinearLayer):
    """PEFT's DoRA of a linear layer, with its magnitude; `squares` (out) holds ‖w‖² of the base's rows in float32."""

    squares: Tensor | None = None
    keeps = False
    norms: Tensor | None = None

    def row_norms(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """‖w + s b A‖ of every row (out, float32): `weight` is out × in, A rank × in, B out × rank."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if self.squares is None:
                self.squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
            crossed = (lora_A.to(weight.dtype) @ weight.T).float()
            first, second = lora_A.float(), lora_B.float()
            gram = ((second @ (first @ first.T)) * second).sum(1)
            cross = (second * crossed.T).sum(1)
            return (self.squares + 2 * scaling * cross + scaling**2 * gram).clamp(min=0).sqrt()

    def factor(self, base_layer: nn.Module, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float) -> Tensor:
        """Magnitude over norm (out), with the gradient of the magnitude."""
        norms = self.norms
        if norms is None:
            weight: Tensor = transpose(dequantize_module_weight(base_layer), self.fan_in_fan_out)
            norms = self.row_norms(weight, lora_A.weight, lora_B.weight, scaling)
            self.norms = norms if self.keeps else None
        return self.weight / norms.to(self.weight.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the base's output (rows × out), as PEFT's own."""
        factor = self.factor(base_layer, lora_A, lora_B, scaling).view(1, -1)
        update = lora_B(lora_A(x))
        if base_result is None:  # with dropout: of the input as the adapter sees it
            weight = transpose(dequantize_module_weight(base_layer), self.fan_in_fan_out)
            base_result = functional.linear(x, weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (factor - 1) * base_result + factor * update * scaling


class FactoredVariant(DoraLinearVariant):
    """PEFT's DoRA of a linear layer, in fewer passes over the layer's output."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output (… × out) for its input and the base's output `result`."""
        base_layer, scaling = module.get_base_layer(), module.scaling[active_adapter]
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        drops = module.training and not isinstance(module.lora_dropout[active_adapter], nn.Identity)
        bias = base_layer.bias
        update = None if drops or (bias is not None and bias.requires_grad) else lora_B(lora_A(x))
        if update is None or update.dtype != result.dtype:
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        factor = module.lora_magnitude_vector[active_adapter].factor(base_layer, lora_A, lora_B, scaling)
        return _Scaled.apply(result, update, bias, factor, scaling)


class _Scaled(torch.autograd.Function):
    """f (y - b + s u) + b for a base's output y with bias b, an update u (… × out), f (out) and the scaling s."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, update: Tensor, bias: Tensor | None, factor: Tensor, scaling: float) -> Tensor:
        whole = torch.add(base, update, alpha=scaling)
        if bias is not None:
            whole.sub_(bias)
        ctx.save_for_backward(whole, factor)
        ctx.scaling = scaling
        made = whole * factor.to(whole.dtype)
        return made if bias is None else made.add_(bias)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = above
        whole, factor = ctx.saved_tensors
        of_factor = (gradient * whole).flatten(0, -2).sum(0, dtype=torch.float32).to(factor.dtype)
        of_base = gradient * factor.to(gradient.dtype)
        return of_base, of_base * ctx.scaling, None, of_factor, None


def install(adapted: PeftModel) -> int:
    """Let every DoRA of a linear layer with frozen weights compute its norms here; returns how many do."""
    installed = 0
    for layer in model.lora_layers(adapted).values():
        magnitudes: Any = getattr(layer, "lora_magnitude_vector", None) or {}
        frozen = not any(name == "weight" and p.requires_grad for name, p in layer.get_base_layer().named_parameters())
        for name, magnitude in magnitudes.items():
            if type(magnitude) is DoraLinearLayer and frozen:
                magnitude.__class__ = FactoredDora
                installed += 1
                if type(layer.lora_variant[name]) is DoraLinearVariant:
                    layer.lora_variant[name] = FactoredVariant()
    return installed


def layers(adapted: PeftModel) -> list[FactoredDora]:
    """Those that do, for `norms_kept`."""
    return [module for module in adapted.modules() if isinstance(module, FactoredDora)]


@contextmanager
def norms_kept(layers: Sequence[FactoredDora]) -> Iterator[None]:
    """Inside, where A and B must not change, each norm is computed once."""
    for layer in layers:
        layer.keeps = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps, layer.norms = False, None
