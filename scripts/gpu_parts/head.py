"""The loss head: milliseconds forward and backward, memory, and whether it is the same loss; lora's
at several sizes of its chunks, beside others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from gpu_parts import levers
from gpu_parts.part import Bench, Case, Figures, NotHereError
from gpu_parts.report import Column
from lora_cli.models import IGNORED
from lora_cli.speed import loss_head

TITLE = "Loss head: 8,192 rows of 4,096, bfloat16, forward and backward to the rows"
COLUMNS = (
    Column("ms", "ms", 1),
    Column("of Hugging Face's", "of_stock", 2),
    Column("MiB", "mib"),
    Column("loss off", "loss", 6),
    Column("gradient off", "gradient", 3, 100, "%"),
)
ROWS, WIDTH = 8192, 4096
VOCABULARIES = (128_256, 262_144, 151_936, 32_000)
CHUNKS = (24, 26, 27, 28)
Side = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""From rows, head and targets (IGNORED where a token has no label) to the summed loss."""


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value: what has to be compiled comes last."""
    own: dict[str, Side] = {"lora": partial(_own, None)}
    own |= {f"lora, 2^{power}": partial(_own, 1 << power) for power in CHUNKS}
    sides: list[dict[str, Side]] = [
        {"Hugging Face": _stock} | own | {"torch": _torch},
        {"Liger": _liger, "cut-cross-entropy": _cut},
    ]
    shares = [(VOCABULARIES[0], 1.0), (VOCABULARIES[0], 0.5), *((v, 1.0) for v in VOCABULARIES[1:])]
    shares = shares[:2] if bench.small else shares
    return {
        f"{vocabulary:,}, {share:.0%} labelled, {name}": Case(
            partial(measure, name, side, vocabulary, share), 25
        )
        for group in sides
        for vocabulary, share in shares
        for name, side in group.items()
    }


def measure(name: str, side: Side, vocabulary: int, share: float, bench: Bench) -> Figures:
    """Return time, memory, and how far loss and gradient are from Hugging Face's."""
    rows, width = (64, 32) if bench.small else (ROWS, WIDTH)
    vocabulary = vocabulary // 128 if bench.small else vocabulary
    device = bench.clock.device
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, device=device, generator=draw).bfloat16().requires_grad_()
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    head.requires_grad_(requires_grad=False)
    targets = torch.randint(0, vocabulary, (rows,), device=device, generator=draw)
    targets[torch.rand(rows, device=device, generator=draw) >= share] = IGNORED

    def step(way: Side) -> Tensor:
        hidden.grad = None
        loss = way(hidden, head, targets)
        loss.backward()
        return loss.detach()

    wanted, wanted_by = step(_stock), hidden.grad.float()
    stock = bench.clock.time(lambda: step(_stock), rounds=3, warm=1)
    bench.clock.free()
    held = bench.clock.read_held()
    loss = step(side)
    most = bench.clock.read_memory()
    found = bench.clock.time(lambda: step(side), rounds=3, warm=1)
    off = (hidden.grad.float() - wanted_by).norm() / wanted_by.norm()
    return found | {
        "of_stock": found["ms"] / stock["ms"],
        "loss": float((loss - wanted).abs() / wanted),
        "gradient": float(off),
        **({"mib": most["allocated_mib"] - held["held_mib"]} if most else {}),
    }


def _own(chunk: int | None, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """As `loss_head.install` lets a model do."""
    at = (targets != IGNORED).nonzero()[:, 0]
    some, wanted = hidden.index_select(0, at), targets.index_select(0, at)
    with levers.use_head_chunks(chunk) if chunk else nullcontext():
        return loss_head.sum_loss(some, head, wanted, loss_head.Shape(1.0, None))


def _stock(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """As transformers' models do: logits of all tokens, in float32."""
    return ForCausalLMLoss(
        head(hidden)[None],
        None,
        head.out_features,
        num_items_in_batch=1,
        shift_labels=targets[None],
    )


def _torch(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    own: Any = getattr(functional, "linear_cross_entropy", None)
    if own is None:
        raise NotHereError(f"torch {torch.__version__} has no linear_cross_entropy")
    return own(hidden, head.weight, targets, reduction="sum", ignore_index=IGNORED)


def _liger(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    if not hidden.is_cuda or not find_spec("liger_kernel"):
        raise NotHereError("Liger is not installed, or there is no GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    own = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    return own(head.weight, hidden, targets)


def _cut(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    if not hidden.is_cuda or not find_spec("cut_cross_entropy"):
        raise NotHereError("cut-cross-entropy is not installed, or there is no GPU")
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head.weight, targets, ignore_index=IGNORED, reduction="sum")
