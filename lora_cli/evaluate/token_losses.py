"""What one pass over a row tells: its loss, summed over the tokens that training would train on,
cross entropy in float32, as `lora train` weighs its eval_loss; and by how much the model likes each
token of an expected answer best.

Rows are rendered, tokenised and masked by the code that makes rows to train on. The sum over all
rows, divided by all their trained tokens, is what training calls eval_loss; it leaves rows beyond
training.max_length out, and here they count as far as the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lora_cli.data import encode, formats
from lora_cli.evaluate.answerers import Answerer
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.evaluate.hf_answerers import HFAnswerer
from lora_cli.gguf import llama_api
from lora_cli.models import IGNORED, chat_template
from lora_cli.speed import dora_norms

LOGITS = 2**26
"""Logits of a batch, of which float32 needs 256 MB: fewer rows are computed at a time where they
would be more."""
BATCH = 1000
"""Rows that are tokenised at a time."""


@dataclass(frozen=True)
class Piece:
    """A text as token ids, with labels that are -100 where nothing is trained."""

    ids: list[int]
    labels: list[int]
    answer: range = range(0)
    """The places whose next tokens are an answer that is looked at."""

    @cached_property
    def trained(self) -> list[int]:
        """The places of tokens whose next one is trained."""
        return [at - 1 for at, label in enumerate(self.labels) if at and label != IGNORED]

    @cached_property
    def places(self) -> list[int]:
        """All places that are looked at."""
        return sorted({*self.trained, *self.answer})


class Loss(NamedTuple):
    """Cross entropy summed over so many tokens, in nats."""

    total: float
    tokens: int


class Seen(NamedTuple):
    """What a pass told of a piece."""

    loss: Loss
    margin: float
    """How far the logit of each token of the answer is above every other, at least; below 0 where
    one is not the likeliest, infinite without an answer."""


class Reading(Protocol):
    """A model that reads pieces."""

    def read(self, pieces: Sequence[Piece]) -> list[Seen]:
        """What a pass over each tells."""

    def ends_answer(self, token: int) -> bool:
        """Whether the model stops writing at a token."""

    def leaves_out(self, token: int) -> bool:
        """Whether a token is no part of the text of an answer."""


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


def find_shared(pieces: Sequence[Piece]) -> list[int]:
    """Return the tokens with which all pieces begin, up to the first place that is looked at in any
    of them: a system prompt, say. They need to be read but once."""
    if len(pieces) < 2:
        return []
    most = min(each.places[0] for each in pieces)
    return pieces[0].ids[: llama_api.count_shared([each.ids for each in pieces], most)]


@contextmanager
def open_reading(
    answerer: Answerer, path: Path, longest: int, shared: Sequence[int] = ()
) -> Iterator[Reading]:
    """Let a model read pieces of up to `longest` tokens; llama.cpp opens the GGUF file at `path`
    once for all, and reads the tokens with which they begin once."""
    if isinstance(answerer, HFAnswerer):
        yield HFReading(answerer)
        return
    with llama_api.open_gguf(path, longest) as opened:
        opened.share(shared)
        yield GGUFReading(opened)


class HFReading:
    """A transformers model."""

    def __init__(self, answerer: HFAnswerer) -> None:
        self.answerer = answerer
        self.ends, self.special = frozenset(answerer.list_ends()), answerer.list_special()

    def read(self, pieces: Sequence[Piece]) -> list[Seen]:
        """All at once, or as many as memory is meant for."""
        network = self.answerer.network
        vocabulary = int(network.config.get_text_config().vocab_size)
        width = max(len(piece.ids) for piece in pieces)
        size = max(1, LOGITS // (width * vocabulary))
        found: list[Seen] = []
        norms = dora_norms.keep_norms(dora_norms.find_layers(network))
        with torch.inference_mode(), self.answerer.switched(), norms:
            for start in range(0, len(pieces), size):
                found += _read_batch(network, pieces[start : start + size])
        return found

    def ends_answer(self, token: int) -> bool:
        """By the tokenizer, the training and the generation config."""
        return token in self.ends

    def leaves_out(self, token: int) -> bool:
        """By the tokenizer."""
        return token in self.special


class GGUFReading(NamedTuple):
    """A GGUF file in llama.cpp."""

    opened: llama_api.Opened

    def read(self, pieces: Sequence[Piece]) -> list[Seen]:
        """One after the other."""
        return [_look(self.opened.compute(each.ids, each.places), each) for each in pieces]

    def ends_answer(self, token: int) -> bool:
        """As llama.cpp has it."""
        return self.opened.ends_answer(token)

    def leaves_out(self, token: int) -> bool:
        """As llama.cpp has it."""
        return self.opened.leaves_out(token)


def _read_batch(network: torch.nn.Module, pieces: Sequence[Piece]) -> list[Seen]:
    """Return what is told of pieces that are computed together, padded at their ends."""
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
    found = []
    for row, piece in zip(logits, pieces):
        places = torch.tensor(piece.places, device=row.device)
        found.append(_look(row.index_select(0, places), piece))
    return found


def _look(logits: torch.Tensor, piece: Piece) -> Seen:
    """Return what is told by the logits (places, vocabulary) at a piece's places."""
    places = torch.tensor(piece.places, device=logits.device)
    wanted = torch.tensor(piece.ids, device=logits.device)[places + 1]
    weighed = _mark(places, piece.trained)
    written = _mark(places, piece.answer)
    rows = max(1, LOGITS // logits.shape[-1])
    total, margin = 0.0, math.inf
    split = (each.split(rows) for each in (logits, wanted, weighed, written))
    for some, tokens, trained, answer in zip(*split):
        chosen = some.float()
        losses = functional.cross_entropy(chosen, tokens, reduction="none").double()
        total += float(losses[trained].sum())
        margin = min(margin, _find_margin(chosen[answer], tokens[answer]))
    return Seen(Loss(total, len(piece.trained)), margin)


def _mark(places: torch.Tensor, wanted: Iterable[int]) -> torch.Tensor:
    """Return which places are wanted."""
    return torch.isin(places, torch.tensor(list(wanted), dtype=torch.long, device=places.device))


def _find_margin(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return how far each token's logit (tokens, vocabulary) is above every other, at least."""
    if not len(tokens):
        return math.inf
    own = logits.gather(1, tokens[:, None])
    others = logits.scatter(1, tokens[:, None], -math.inf).amax(1, keepdim=True)
    margin = float((own - others).min())
    return margin if math.isfinite(margin) else -math.inf


def add_up(losses: Sequence[Loss]) -> Loss:
    """Return the loss of what was computed in pieces."""
    return Loss(sum(each.total for each in losses), sum(each.tokens for each in losses))
