"""NF4: weights as 4-bit codes of normal quantiles with doubly quantised block scales, and LoRA on
top of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_cli.doctor.reference.layers import LoRALinear

BLOCK = 64
"""Weights that share one scale."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own."""


def nf4_codebook() -> Tensor:
    """Return the 16 values of NF4, float32, rising from −1 to 1 (QLoRA, section 3 and appendix E).

    Quantiles Φ⁻¹ of the standard normal at probabilities evenly spaced from δ to ½, 8 of them above
    zero and 7 below, zero itself, divided by the largest. δ = ½·((1 − 1/32) + (1 − 1/30)), written
    0.9677083 where it was first computed.
    """
    delta = 0.9677083
    above = torch.special.ndtri(torch.linspace(delta, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(delta, 0.5, 8)[:-1].double())
    values = torch.cat([below, above.new_zeros(1), above.flip(0)]).float()
    return values / values.max()


def dynamic_codebook() -> Tensor:
    """Return the 256 values that scales are quantised to, float32, rising: 8-bit dynamic type
    (Dettmers 2015, 1511.04561).

    For each decade from 10⁻⁶ to 1, twice as many values as for the one below, evenly spaced between
    a tenth and all of it, of both signs; and 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        middle = 10.0 ** (bits - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middle, -middle]
    return torch.cat(values).sort().values


def blocks(values: Tensor, size: int) -> Tensor:
    """Return a flat tensor as rows of `size`, the last one filled with zeros."""
    return nn.functional.pad(values, (0, -values.numel() % size)).reshape(-1, size)


def nearest(values: Tensor, codebook: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each value's nearest code relative to the largest magnitude of its block: codes (n,), absmax
    (⌈n/size⌉,)."""
    rows = blocks(values, size)
    absmax = rows.abs().amax(dim=1)
    scaled = rows * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)
    codes = torch.bucketize(scaled.clamp(-1, 1), (codebook[:-1] + codebook[1:]) / 2)
    return codes.flatten()[: values.numel()], absmax


class NF4Tensor(nn.Module):
    """A tensor in NF4: w ≈ codebook[code]·absmax, one absmax per 64 weights, counted over the
    flattened tensor.

    `packed` (⌈n/2⌉,) uint8 holds two codes a byte, the first in the upper half. With double
    quantisation the absmax, less their mean (`offset`), are 8-bit codes themselves (`scale_codes`),
    one float32 `scale_absmax` per 256: 0.127 bit per weight in place of 0.5. Everything is computed
    in float32. A module, so that its buffers are saved.
    """

    def __init__(self, weight: Tensor, double_quant: bool = True) -> None:
        super().__init__()
        self.shape, self.dtype, self.double_quant = weight.shape, weight.dtype, double_quant
        self.register_buffer("codebook", nf4_codebook().to(weight.device), persistent=False)
        self.register_buffer(
            "scale_codebook", dynamic_codebook().to(weight.device), persistent=False
        )
        codes, absmax = nearest(weight.detach().flatten().float(), self.codebook, BLOCK)
        pairs = blocks(codes, 2).to(torch.uint8)
        self.register_buffer("packed", pairs[:, 0] << 4 | pairs[:, 1])
        if double_quant:
            self.register_buffer("offset", absmax.mean())
            scale_codes, scale_absmax = nearest(
                absmax - self.offset, self.scale_codebook, SCALE_BLOCK
            )
            self.register_buffer("scale_codes", scale_codes.to(torch.uint8))
            self.register_buffer("scale_absmax", scale_absmax)
        else:
            self.register_buffer("plain_absmax", absmax)

    def absmax(self) -> Tensor:
        """One scale per block, (⌈n/64⌉,)."""
        if not self.double_quant:
            return self.plain_absmax
        rows = blocks(self.scale_codebook[self.scale_codes.long()], SCALE_BLOCK)
        return (rows * self.scale_absmax.unsqueeze(1)).flatten()[
            : self.scale_codes.numel()
        ] + self.offset

    def dequantize(self) -> Tensor:
        """Return the values that the codes stand for, in the shape and type the weight had."""
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=1).flatten().long()
        rows = blocks(self.codebook[codes][: self.shape.numel()], BLOCK) * self.absmax().unsqueeze(
            1
        )
        return rows.flatten()[: self.shape.numel()].reshape(self.shape).to(self.dtype)


class QLoRALinear(LoRALinear):
    """h = dequantize(NF4(W₀))x + b + s·BAx: LoRA on a Linear whose weight is kept in NF4
    (`quantized`) and not else.

    Shapes as for LoRALinear. The adapter and the gradient of x see the dequantised weight, and so
    does merging: it leaves a plain Linear with dequantize(NF4(W₀)) + s·BA.
    """

    def __init__(
        self, base: nn.Linear, *args: object, double_quant: bool = True, **kwargs: object
    ) -> None:
        super().__init__(base, *args, **kwargs)  # type: ignore[arg-type]
        self.quantized = NF4Tensor(base.weight, double_quant)
        base.weight.data = base.weight.new_empty(0)

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        if self.original is not None:
            return self.base(x)
        base = nn.functional.linear(x, self.weight, self.base.bias)
        return base + self.scaling * self.apply_adapter(self.drop(x))
