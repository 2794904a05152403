"""Rows of one optimiser step share sequences: no padding, and the same training run.

Packing a data set beforehand (TRL's `packing`) fills every sequence, but a step then sees other and
more rows than the batch size says, so that learning rate and schedule must be found anew. Here each
step's own rows are put into as few sequences as hold them, one after another; a sequence is one
forward pass, and the step's gradient is the sum over its sequences, each divided by the step's
number of labels. That is what gradient accumulation over padded batches gives, up to rounding.

Documents are kept apart by `position_ids` that begin again at 0, without an attention mask, as
transformers understands it; `unsuitable` tries that on the model itself.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.models import IGNORED

CUTS = "cuts"
SEQUENCE = 1024
"""Longest sequence that rows are put together to, in tokens: longer ones make more of attention
than of the rest."""
LEAK = 1e-4
"""Largest difference of logits, per unit of their spread, that another document's words may
make."""
NEAR = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""Largest difference of logits, per unit of their spread, between a document alone and among
others."""


class StepCollator(NamedTuple):
    """Rows with `input_ids` and `labels` as sequences of at most `length` tokens (a longer row has
    one to itself).

    The sequences stand one after another in tensors of shape (1, tokens); `cuts` says where each
    begins, and the end.
    """

    length: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        bins = fit_bins([len(row["input_ids"]) for row in rows], self.length)
        ordered = [rows[place] for places in bins for place in places]
        ids = [torch.as_tensor(row["input_ids"]) for row in ordered]
        labels = [torch.as_tensor(row["labels"]).clone() for row in ordered]
        for own in labels:
            own[0] = IGNORED  # no token of its own row stands before it that could predict it
        made = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": [torch.arange(len(row)) for row in ids],
        }
        sizes = [sum(len(rows[place]["input_ids"]) for place in places) for places in bins]
        joined: dict[str, Any] = {
            name: torch.cat(parts).long()[None] for name, parts in made.items()
        }
        return joined | {CUTS: list(accumulate(sizes, initial=0))}


def fit_bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """The places of `lengths` in bins of `capacity`, best fit, longest first; what is over it has a
    bin to itself."""
    bins, free = list[list[int]](), list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [number for number, left in enumerate(free) if left >= lengths[place]]
        if not fitting:
            bins.append([])
            free.append(capacity)
        best = min(fitting, key=free.__getitem__) if fitting else len(bins) - 1
        bins[best].append(place)
        free[best] -= lengths[place]
    return bins


def split_sequences(inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The sequences of a step that `StepCollator` made, each with tensors of shape (1, tokens)."""
    cuts = inputs[CUTS]
    return [
        {name: tensor[:, start:end] for name, tensor in inputs.items() if name != CUTS}
        for start, end in pairwise(cuts)
    ]


def find_unsuitable(model: PreTrainedModel) -> str | None:
    """None if documents in one sequence do not see each other in `model`, with its kernel of
    attention; else why not.

    Other words in the first of three must leave the logits of the others as they are, and those
    must be what they are alone, as far as the model's type tells.
    """
    size = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.arange(24, device=model.device) * 37 % size
    ends = (0, 7, 18, 24)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(ends)]).to(
        model.device
    )[None]
    changed = torch.where(torch.arange(24, device=model.device) < ends[1], (ids + 11) % size, ids)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = [
            model(input_ids=ids[None, start:end], use_cache=False).logits
            for start, end in pairwise(ends)
        ]
        first, other = (
            model(input_ids=some[None], position_ids=positions, use_cache=False).logits[0].float()
            for some in (ids, changed)
        )
    model.train(training)
    apart = torch.cat(alone, 1)[0].float()
    seen = (first - other)[ends[1] :].abs().max() / apart.std()
    moved = (first - apart).abs().max() / apart.std()
    if seen <= LEAK and moved <= NEAR[model.dtype]:
        return None
    off = f"{max(seen, moved):.2g}"
    return f"documents in one sequence see each other in this model (logits differ by {off})"
