"""Adapted layers: LoRA and DoRA on Linear, Embedding and Conv2d. The equations stand in
`__init__.py`.

What the three kinds of layer differ in is how a weight is applied to an input (`apply_weight`), how
B·A is (`apply_adapter`) and what shape it has (`delta_weight`). LoRA and DoRA are each written
once, on top of those.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Init = Literal["kaiming_uniform", "gaussian"]


class LoRALayer(nn.Module):
    """h = W₀x + b + s·B(A(dropout(x))), with W₀ and b frozen and s = α/r (rsLoRA: α/√r).

    `lora_A` starts Kaiming-uniform with a = √5, or Gaussian with standard deviation 1/r; `lora_B`
    starts at zero, so that step 0 equals the base. Both have the base's type and device.

    Raises ValueError for r < 1, an unknown `init`, and bases whose update the formulas do not
    cover.
    """

    base: nn.Linear | nn.Embedding | nn.Conv2d
    out_dim = 0
    """Axis of the weight that counts outputs."""
    beside_output: tuple[int, ...] = (-1,)
    """Shape in which one number per output broadcasts on the result."""

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: Init = "kaiming_uniform",
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, not {r}")
        if init not in ("kaiming_uniform", "gaussian"):
            raise ValueError(f"init must be kaiming_uniform or gaussian, not {init}")
        self.base = base.requires_grad_(False)
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout)
        shape_A, shape_B = self.adapter_shapes()
        self.lora_A = nn.Parameter(
            torch.empty(shape_A, dtype=base.weight.dtype, device=base.weight.device)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(shape_B, dtype=base.weight.dtype, device=base.weight.device)
        )
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.original: Tensor | None = None
        """While merged: W₀."""

    @property
    def weight(self) -> Tensor:
        """W₀, whether merged or not."""
        return self.base.weight if self.original is None else self.original

    def adapter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `lora_A` and `lora_B`."""
        raise NotImplementedError

    def apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the base's operation on x with this weight and no bias."""
        raise NotImplementedError

    def apply_adapter(self, x: Tensor) -> Tensor:
        """B(A(x)), without forming B·A."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW = s·BA, in the shape of the base's weight."""
        raise NotImplementedError

    def drop(self, x: Tensor) -> Tensor:
        """Return the adapter's input: dropout while training."""
        return self.dropout(x)

    def merged_weight(self) -> Tensor:
        """Return the weight of the plain layer that computes the same function: W₀ + ΔW."""
        return self.weight + self.delta_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x as the base takes it; the result in the base's shape."""
        if self.original is not None:
            return self.base(x)
        return self.base(x) + self.scaling * self.apply_adapter(self.drop(x))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the merged weight in the place of the base's. Nothing if it is there already."""
        if self.original is None:
            self.original, self.base.weight.data = self.base.weight.data, self.merged_weight()

    def unmerge(self) -> None:
        """Put W₀ back, exactly. Nothing if it is there."""
        if self.original is not None:
            self.original, self.base.weight.data = None, self.original


class LoRALinear(LoRALayer):
    """W₀ (out, in), A (r, in), B (out, r); x (…, in) -> (…, out)."""

    def adapter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.r, self.base.in_features), (self.base.out_features, self.r)

    def apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight)

    def apply_adapter(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def delta_weight(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A


class LoRAEmbedding(LoRALayer):
    """W₀ (num, dim), A (r, num), B (dim, r); ids (…) -> (…, dim): a row of Aᵀ is looked up, then
    mapped by B.

    The linear map of one-hot vectors with weight W₀ᵀ; ids are not dropped out. Refuses `max_norm`,
    which changes weights in the forward pass, and `sparse` gradients. (loralib and PEFT start with
    A zero and B Gaussian instead: step 0 is the base too.)
    """

    out_dim = 1

    def adapter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.base.max_norm is not None or self.base.sparse:
            raise ValueError("an Embedding with max_norm or sparse gradients cannot be adapted")
        return (self.r, self.base.num_embeddings), (self.base.embedding_dim, self.r)

    def drop(self, x: Tensor) -> Tensor:
        return x

    def apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.embedding(
            x, weight, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )

    def apply_adapter(self, x: Tensor) -> Tensor:
        return F.linear(self.apply_weight(self.lora_A.T, x), self.lora_B)

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A).T


class LoRAConv2d(LoRALayer):
    """W₀ (out, in/g, kh, kw), A (r, in/g, kh, kw), B (out, r/g, 1, 1), g groups; x (n, in, h, w) ->
    (n, out, h', w').

    A is a convolution of the base's own geometry (stride, padding, dilation, groups) with r output
    channels, B a 1×1 mix of them. With groups, ΔW of each is B_g·A_g of rank r/g. Refuses r that
    the groups do not divide, and padding with anything but zeros.
    """

    beside_output = (-1, 1, 1)

    def adapter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.base
        if self.r % base.groups:
            raise ValueError(f"r = {self.r} must be a multiple of the {base.groups} groups")
        if base.padding_mode != "zeros":
            raise ValueError(f"padding_mode {base.padding_mode} is not covered, only zeros")
        inner = (base.in_channels // base.groups, *base.kernel_size)
        return (self.r, *inner), (base.out_channels, self.r // base.groups, 1, 1)

    def apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        base = self.base
        return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation, base.groups)

    def apply_adapter(self, x: Tensor) -> Tensor:
        return F.conv2d(self.apply_weight(self.lora_A, x), self.lora_B, groups=self.base.groups)

    def delta_weight(self) -> Tensor:
        groups = self.base.groups
        A, B = (
            self.lora_A.reshape(groups, self.r // groups, -1),
            self.lora_B.reshape(groups, -1, self.r // groups),
        )
        return self.scaling * (B @ A).reshape(self.base.weight.shape)


class DoRA(LoRALayer):
    """h = (m/‖V‖) ⊙ (W₀x̃ + s·BAx̃) + (W₀x − W₀x̃) + b, with V = W₀ + s·BA and x̃ = dropout(x).

    `magnitude` m starts as ‖W₀‖, so that step 0 equals the base: one per output, (out,), for Conv2d
    (1, out, 1, 1). ‖·‖ is the Euclidean norm over everything that leads to one output: a row of
    Linear's weight, a column of Embedding's, a filter of Conv2d's. In the gradient ‖V‖ counts as a
    constant (section 4.3 of the paper). As in the authors' code, dropout acts on all that the
    adapter changes: with x̃ = x the middle term vanishes. Raises ValueError for an output whose
    weights are all zero, or not finite.
    """

    def __init__(self, base: nn.Module, *args: object, **kwargs: object) -> None:
        super().__init__(base, *args, **kwargs)  # type: ignore[arg-type]
        shape = (1, -1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        self.magnitude = nn.Parameter(self.norm().detach().clone().reshape(shape))
        if not (self.magnitude > 0).all():
            raise ValueError(
                "an output whose weights are all zero, or not finite, has no direction"
            )

    def norm(self) -> Tensor:
        """‖W₀ + ΔW‖ per output, (out,)."""
        rows = (self.weight + self.delta_weight()).transpose(0, self.out_dim).flatten(1)
        return torch.linalg.vector_norm(rows, dim=1)

    def on_weight(self, numbers: Tensor) -> Tensor:
        """One number per output, in a shape that broadcasts on the weight."""
        shape = [1] * self.weight.dim()
        shape[self.out_dim] = -1
        return numbers.reshape(shape)

    def direction(self) -> Tensor:
        """V/‖V‖, in the shape of the weight: of unit norm for each output."""
        return (self.weight + self.delta_weight()) / self.on_weight(self.norm())

    def merged_weight(self) -> Tensor:
        """m ⊙ V/‖V‖."""
        return self.on_weight(self.magnitude) * self.direction()

    def forward(self, x: Tensor) -> Tensor:
        if self.original is not None:
            return self.base(x)
        dropped = self.drop(x)
        unchanged = self.apply_weight(self.weight, dropped)
        adapted = unchanged + self.scaling * self.apply_adapter(dropped)
        factor = self.magnitude.flatten() / self.norm().detach()
        return self.base(x) - unchanged + factor.reshape(self.beside_output) * adapted


class DoRALinear(DoRA, LoRALinear):
    """DoRA on Linear: one magnitude per row of W₀ (out, in)."""


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """DoRA on Embedding: one magnitude per column of W₀ (num, dim), the rows of the linear map's
    weight W₀ᵀ."""


class DoRAConv2d(DoRA, LoRAConv2d):
    """DoRA on Conv2d: one magnitude per filter of W₀ (out, in/g, kh, kw)."""
