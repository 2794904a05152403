"""How far apart two results of the same sum of products may lie: in units in the last place, on any
processor.

An element-wise sum or product is rounded alike by every kernel. A sum of many products, as in a
matrix product or a norm, is rounded after each term, and a kernel chooses their order and whether
to round in between: by the processor, by the shape, and so otherwise for some rows of a tensor than
for the whole.
"""

from __future__ import annotations

import torch

UNITS = 4
"""Float32, of the largest weight in the row. Measured with rows merged one by one, which takes a
kernel for vectors where the whole tensor takes one for matrices: 1 for LoRA, 2 for DoRA, which sums
a whole row for its norm."""
SHARE = 1e-3
"""Of 16-bit weights that lie so near the edge between two numbers that those units decide. At most
2^-11 of fp16 ones as large as their row's largest, more of the small ones; measured: 1.4e-4.
Rounding twice changes a tenth."""


def apart(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the given type at the largest number in
    the row."""
    largest = (
        wanted.double().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    )
    unit = torch.finfo(given.dtype).eps * largest.log2().floor().exp2()
    return ((given.double() - wanted.double()).abs() / unit).max().item()


def same_sum(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether `given` is `wanted` (float32), rounded once, but for the order in which products were
    summed."""
    if given.dtype == torch.float32:
        return apart(given, wanted) <= UNITS
    rounded = wanted.to(given.dtype)
    return apart(given, rounded) <= 1 and (given != rounded).double().mean().item() <= SHARE


STEADY_ADAM = "adam_epsilon: 1e-4"
"""For runs that are compared weight by weight. AdamW divides a gradient by its own size, so with the
usual epsilon (1e-8) the rounding of one near zero moves its weight as far as a large one would:
2.2e-5 apart, by the tiny model's and the processor's luck. With this one 6.0e-8, over three models
and three instruction sets, where weights have moved by 3e-3."""


def assert_same_training(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Both runs, with STEADY_ADAM, came to the same weights but for the order of sums."""
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            given[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )
