"""Compute DoRA's norms without the full product: the norm of W + sBA from products of the adapter's
rank, once per optimiser step.

DoRA divides by the norm of each row of W + sBA in every forward pass. PEFT makes BA for that, as
large as W. But

    ‖w + s b A‖² = ‖w‖² + 2s ⟨b, A w⟩ + s² b (A Aᵀ) bᵀ    for a row w of W and the same row b of B

needs A Wᵀ (rank × out) and A Aᵀ (rank × rank) only, and ‖w‖² once, since W is not trained. As in
the paper (section 4.3) and in PEFT, the norm is a constant to the gradient. Sums are in float32,
also where PEFT rounds to 16 bits. Within `keep_norms` each norm is computed once, since A and B
stay as they are until the optimiser's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.models import attach


class FactoredDora(DoraLinearLayer):
    """PEFT's DoRA of a linear layer, with its magnitude; `squares` (out) holds ‖w‖² of the base's
    rows in float32."""

    squares: Tensor | None = None
    keeps = False
    norms: Tensor | None = None

    def compute_norms(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """Return ‖w + s b A‖ of every row (out, float32): `weight` is out × in, A rank × in, B out
        × rank."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if self.squares is None:
                self.squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
            first, second = lora_A.float(), lora_B.float()
            crossed = (weight @ lora_A.to(weight.dtype).T).float()
            both = torch.addmm(crossed, second, first @ first.T, beta=2 * scaling, alpha=scaling**2)
            return (self.squares + torch.linalg.vecdot(both, second)).clamp_(min=0).sqrt_()

    def get_norms(
        self, weight: Callable[[], Tensor], lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """Return the norms, kept or computed; `weight` is called only where they have to be
        computed."""
        if self.norms is not None:
            return self.norms
        norms = self.compute_norms(weight(), lora_A, lora_B, scaling)
        self.norms = norms if self.keeps else None
        return norms

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
        """Return what DoRA adds to the base's output (rows × out), as PEFT's own forward does."""

        def weight() -> Tensor:
            return transpose(dequantize_module_weight(base_layer), self.fan_in_fan_out)

        norms = self.get_norms(weight, lora_A.weight, lora_B.weight, scaling)
        factor = (self.weight / norms.to(self.weight.dtype)).view(1, -1)
        update = lora_B(lora_A(x))
        if base_result is None:  # with dropout: of the input as the adapter sees it
            base_result = functional.linear(x, weight().to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (factor - 1) * base_result + factor * update * scaling


def install(adapted: PeftModel) -> int:
    """Let every DoRA of a linear layer with frozen weights compute its norms here; return how many
    do."""
    installed = 0
    for layer in attach.find_lora_layers(adapted).values():
        magnitudes: Any = getattr(layer, "lora_magnitude_vector", None) or {}
        frozen = not any(
            name == "weight" and p.requires_grad
            for name, p in layer.get_base_layer().named_parameters()
        )
        for magnitude in magnitudes.values():
            if type(magnitude) is DoraLinearLayer and frozen:
                magnitude.__class__ = FactoredDora
                installed += 1
    return installed


def find_layers(adapted: nn.Module) -> list[FactoredDora]:
    """Return the layers that `install` changed, for `keep_norms`."""
    return [module for module in adapted.modules() if isinstance(module, FactoredDora)]


@contextmanager
def keep_norms(layers: Sequence[FactoredDora]) -> Iterator[None]:
    """Compute each norm once while inside, where A and B must not change."""
    for layer in layers:
        layer.keeps = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps, layer.norms = False, None
