"""Put the rows of one optimiser step into shared sequences: no padding, and the same training run.

Packing a data set beforehand (TRL's `packing`) fills every sequence, but a step then sees different
and more rows than the batch size says, so that learning rate and schedule must be found anew. Here
each step's own rows are put into as few sequences as hold them, one after another. A sequence is
one forward pass, and the step's gradient is the sum over its sequences, each divided by the step's
number of labels. That is what gradient accumulation over padded batches gives, up to rounding.

Documents are kept apart by `position_ids` that begin again at 0, without an attention mask, as
transformers understands it; `find_unsuitable` tries that on the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.models import IGNORED, num_layers
from lora_cli.speed import document_attention, loss_head
from lora_cli.speed.loss_head import LABELLED

CUTS = "cuts"
"""Where each sequence of a step begins, and the end of the last."""
BOUNDS = "bounds"
"""Where each document of a sequence begins, and the end of the last (int32)."""
LONGEST = "longest"
"""The length of each sequence's longest document."""
BY_TOKEN = ("input_ids", "labels", "position_ids")
SEQUENCE = 1024
"""The longest sequence that rows are joined to, in tokens, where the work of attention grows with
its square: longer ones spend more on that than on the rest."""
LONG_SEQUENCE = 8192
"""... on a GPU, where each row attends by itself. Not measured."""
LEAK = 1e-4
"""The largest difference of logits, per unit of their spread, that the words of another document
may make."""
NEAR = 5
"""The root mean square difference of logits between a document alone and among others, in units of
their spread, the type's epsilon and the root of the number of layers, whose errors add up like
that. Measured: 0.2 to 0.7 in 16 bits, 0.5 to 2.2 in float32 (SmolLM2-135M, its first four layers,
random models of 2 and 30 layers); a document that is seen, or counted otherwise, moves logits by
0.4 to 1.2 of their spread. The largest difference says less: 0.11 of the spread for SmolLM2."""


@dataclass(frozen=True)
class StepCollator:
    """Joins rows with `input_ids` and `labels` into sequences of at most `length` tokens.

    A longer row has one to itself. A row with `documents` is so many documents of these lengths,
    which are not parted; any other is one. The sequences stand one after another in tensors of
    shape (1, tokens); `cuts` holds where each begins, and the end. What their labels and documents
    are is found here, where the numbers are at hand: `labelled` and `bounds` stand one after
    another as well, each with its own cuts, and `longest` holds the length of each sequence's
    longest document.
    """

    length: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        bins = fit_bins([len(row["input_ids"]) for row in rows], self.length)
        ordered = [rows[place] for places in bins for place in places]
        ids = [torch.as_tensor(row["input_ids"]) for row in ordered]
        own = [torch.as_tensor(row["labels"]).clone() for row in ordered]
        documents = [list_documents(row) for row in ordered]
        for each, sizes in zip(own, documents):
            # no token of its own document stands before it that could predict it
            each[list(accumulate(sizes[:-1], initial=0))] = IGNORED
        made = {
            "input_ids": ids,
            "labels": own,
            "position_ids": [torch.arange(size) for sizes in documents for size in sizes],
        }
        joined: dict[str, Any] = {
            name: torch.cat(parts).long()[None] for name, parts in made.items()
        }
        lengths = [
            [size for place in places for size in list_documents(rows[place])] for places in bins
        ]
        cuts = list(accumulate(map(sum, lengths), initial=0))
        labels = joined["labels"]
        labelled = [loss_head.find_labelled(labels[:, start:end]) for start, end in pairwise(cuts)]
        bounds = [
            torch.tensor(list(accumulate(each, initial=0)), dtype=torch.int32) for each in lengths
        ]
        joined |= {CUTS: cuts, LONGEST: [max(each) for each in lengths]}
        return joined | _join(LABELLED, labelled) | _join(BOUNDS, bounds)


def list_documents(row: Mapping[str, Any]) -> list[int]:
    """Return the lengths of a row's documents."""
    return list(row.get("documents", ())) or [len(row["input_ids"])]


def _join(name: str, parts: list[Tensor]) -> dict[str, Any]:
    """Return tensors one after another in one row, so that one copy takes them to the device and
    what cuts a batch to its rows leaves them whole; and their cuts."""
    cuts = list(accumulate(map(len, parts), initial=0))
    return {name: torch.cat(parts)[None], _name_cuts(name): cuts}


def _name_cuts(name: str) -> str:
    return f"{name}_{CUTS}"


def fit_bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the places of `lengths` in bins of `capacity`, by best fit, longest first; what is
    longer has a bin to itself."""
    bins = list[list[int]]()
    free = list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [number for number, left in enumerate(free) if left >= lengths[place]]
        if not fitting:
            bins.append([])
            free.append(capacity)
        best = min(fitting, key=free.__getitem__) if fitting else len(bins) - 1
        bins[best].append(place)
        free[best] -= lengths[place]
    return bins


def split_sequences(
    inputs: dict[str, Any], labelled: bool = False, documents: bool = False
) -> list[dict[str, Any]]:
    """Return the sequences of a step that `StepCollator` made, each with tensors of shape (1,
    tokens).

    With `labelled` each names the places of its labels, as `loss_head` takes them; with `documents`
    the bounds of its documents, as attention that knows documents does.
    """
    sequences = [
        {name: inputs[name][:, start:end] for name in BY_TOKEN}
        for start, end in pairwise(inputs[CUTS])
    ]
    if labelled:
        for sequence, places in zip(sequences, _split(inputs, LABELLED)):
            sequence[LABELLED] = places
    if documents:
        for sequence, bounds, longest in zip(sequences, _split(inputs, BOUNDS), inputs[LONGEST]):
            sequence |= document_attention.describe_documents(bounds, longest)
    return sequences


def _split(inputs: dict[str, Any], name: str) -> list[Tensor]:
    """Return the tensors that `_join` put one after another."""
    return [inputs[name][0, start:end] for start, end in pairwise(inputs[_name_cuts(name)])]


def find_unsuitable(model: PreTrainedModel, length: int = SEQUENCE) -> str | None:
    """Return None if documents in one sequence do not see each other in `model`, else how far they
    do; or that no sequence may be as long as `length`.

    Tried with the model's own attention kernel on three documents: other words in the first must
    leave the logits of the others the same, and those must be what they are alone, within the
    rounding of the model's type.
    """
    size = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.arange(24, device=model.device) * 37 % size
    ends = (0, 7, 18, 24)
    packed = _describe_packed(model, ends)
    in_first = torch.arange(24, device=model.device) < ends[1]
    changed = torch.where(in_first, (ids + 11) % size, ids)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = [
            model(input_ids=ids[None, start:end], use_cache=False).logits
            for start, end in pairwise(ends)
        ]
        first, other = (
            model(input_ids=some[None], **packed).logits[0].float() for some in (ids, changed)
        )
    limited = _takes_no_longer(model, length)
    model.train(training)
    if limited is not None:
        return limited
    apart = torch.cat(alone, 1)[0].float()
    seen = (first - other)[ends[1] :].abs().max() / apart.std()
    moved = (first - apart).square().mean().sqrt() / apart.std()
    layers = num_layers(model.config)
    near = NEAR * torch.finfo(model.dtype).eps * math.sqrt(layers)
    if seen <= LEAK and moved <= near:
        return None
    off = f"{max(seen, moved):.2g}"
    return f"documents in one sequence see each other in this model (logits differ by {off})"


def _describe_packed(model: PreTrainedModel, ends: tuple[int, ...]) -> dict[str, Any]:
    """Return what a model is given beside the ids of one sequence, whose documents begin at these
    places but the last."""
    counted = torch.cat([torch.arange(end - start) for start, end in pairwise(ends)])
    packed = {"position_ids": counted.to(model.device)[None], "use_cache": False}
    if document_attention.takes_bounds(model):
        bounds = torch.tensor(ends, dtype=torch.int32, device=model.device)
        longest = max(end - start for start, end in pairwise(ends))
        packed |= document_attention.describe_documents(bounds, longest)
    return packed


@torch.no_grad()
def _takes_no_longer(model: PreTrainedModel, length: int) -> str | None:
    """Return that `model` takes no sequence longer than its positions, even where each document
    counts from 0 (GPT-Neo's table for its mask); None if it does."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions >= length:
        return None
    ids = torch.zeros(1, positions + 1, dtype=torch.long, device=model.device)
    counted = torch.arange(positions + 1, device=model.device)[None] % positions
    try:
        model(input_ids=ids, position_ids=counted, use_cache=False)
    except (RuntimeError, IndexError):
        return f"this model takes no sequence of more than {positions} tokens"
    return None
