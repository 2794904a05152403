"""The loss of each row, summed over the tokens that training would train on: cross entropy in
float32, as `lora train` weighs its eval_loss.

Rows are rendered, tokenised and masked by the code that makes rows to train on. The sum over all
rows, divided by all their trained tokens, is what training calls eval_loss; it leaves rows beyond
training.max_length out, and here they count as far as the model reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lora_cli.data import encode, formats
from lora_cli.evaluate.answerers import HFAnswerer
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.gguf import llama_api
from lora_cli.models import IGNORED, chat_template
from lora_cli.speed import dora_norms

LOGITS = 2**26
"""Logits of a batch, of which float32 needs 256 MB: fewer rows are computed at a time where they
would be more."""
BATCH = 1000
"""Rows that are tokenised at a time."""


class Piece(NamedTuple):
    """A text as token ids, with labels that are -100 where nothing is trained."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> list[int]:
        """The places of tokens whose next one is trained."""
        return [at - 1 for at, label in enumerate(self.labels) if at and label != IGNORED]


class Loss(NamedTuple):
    """Cross entropy summed over so many tokens, in nats."""

    total: float
    tokens: int


Made = list[Piece] | formats.BadRow
"""What a row became, several pieces where its earlier turns change with later ones; or why it
cannot be."""


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, train_on: str, rows: Sequence[HeldRow]
) -> list[Made]:
    """Return each row as it would be trained on; without pieces where nothing of it would be."""
    renderer = encode.Renderer(tokenizer, train_on)
    made: list[Made] = [[] for _ in rows]
    asked: list[tuple[int, object]] = []
    for at, row in enumerate(rows):
        try:
            asked.append((at, renderer.find_converter(row.style)(row.row)))
        except formats.BadRow as bad:
            made[at] = bad
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    numbered = [[(str(at), row) for at, row in batch] for batch in batches]
    for batch, encoded in renderer.encode(numbered):
        for (number, _), found in zip(batch, encoded):
            made[int(number)] = found if isinstance(found, formats.BadRow) else _make_pieces(found)
    return made


def _make_pieces(encoded: Iterable[encode.Encoded]) -> list[Piece]:
    """Return what training would train on; an answer that begins inside a token it leaves out."""
    pieces = [
        Piece(each.input_ids.tolist(), each.labels.tolist())
        for each in encoded
        if not each.begins_inside
    ]
    return [piece for piece in pieces if piece.trained]


def needs_template(tokenizer: PreTrainedTokenizerBase, rows: Sequence[HeldRow]) -> bool:
    """Return whether there are conversations, and no template that renders them."""
    return chat_template.find_template(tokenizer) is None and any(row.question for row in rows)


def make_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the places of rows in batches of about one length, the longest first: what memory does
    not suffice for is told at once."""
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    return [order[start : start + size] for start in range(0, len(order), size)]


def sum_losses(answerer: HFAnswerer, pieces: Sequence[Piece]) -> list[Loss]:
    """Return each piece's loss by a transformers model."""
    network = answerer.network
    vocabulary = int(network.config.get_text_config().vocab_size)
    width = max(len(piece.ids) for piece in pieces)
    size = max(1, LOGITS // (width * vocabulary))
    found: list[Loss] = []
    norms = dora_norms.keep_norms(dora_norms.find_layers(network))
    with torch.inference_mode(), answerer.switched(), norms:
        for start in range(0, len(pieces), size):
            found += _sum_batch(network, pieces[start : start + size])
    return found


def _sum_batch(network: torch.nn.Module, pieces: Sequence[Piece]) -> list[Loss]:
    """Return the losses of pieces that are computed together, padded at their ends."""
    width = max(len(piece.ids) for piece in pieces)
    ids = torch.zeros(len(pieces), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, piece in enumerate(pieces):
        ids[at, : len(piece.ids)] = torch.tensor(piece.ids)
        mask[at, : len(piece.ids)] = 1
    device = next(network.parameters()).device
    # a mask of ones is left out: some models compute nothing else without one
    given = {} if mask.all() else {"attention_mask": mask.to(device)}
    logits = network(input_ids=ids.to(device), use_cache=False, **given).logits
    return [_sum_logits(row, piece) for row, piece in zip(logits, pieces)]


def _sum_logits(logits: torch.Tensor, piece: Piece) -> Loss:
    """Return the loss by a piece's logits (length or more, vocabulary)."""
    at = piece.trained
    wanted = torch.tensor([piece.labels[place + 1] for place in at], device=logits.device)
    rows = max(1, LOGITS // logits.shape[-1])
    total = 0.0
    for places, some in zip(torch.tensor(at).split(rows), wanted.split(rows)):
        chosen = logits[places.to(logits.device)].float()
        total += float(functional.cross_entropy(chosen, some, reduction="none").double().sum())
    return Loss(total, len(at))


def walk_gguf_losses(path: Path, pieces: Sequence[Piece]) -> Iterator[Loss]:
    """Yield each piece's loss by a GGUF file in llama.cpp, one after the other."""
    given = llama_api.compute_logits(path, [piece.ids for piece in pieces])
    return (_sum_logits(logits, piece) for logits, piece in zip(given, pieces))


def add_up(losses: Sequence[Loss]) -> Loss:
    """Return the loss of what was computed in pieces."""
    return Loss(sum(each.total for each in losses), sum(each.tokens for each in losses))
