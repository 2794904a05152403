"""Let a model read the rows that it is scored on: their losses, and which expected answers it would
write; and the general text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.common import ui
from lora_cli.data import formats
from lora_cli.evaluate import forgetting, token_losses
from lora_cli.evaluate.computing import Computing
from lora_cli.evaluate.foreseen import Guesses
from lora_cli.evaluate.gguf_answerer import GGUFAnswerer
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.evaluate.hf_answerers import HFAnswerer
from lora_cli.evaluate.kept_scores import GENERAL
from lora_cli.evaluate.token_losses import Loss, Piece, Reading
from lora_cli.gguf import llama_api
from lora_cli.models import make_probes

Made = list[tuple[HeldRow, list[Piece]]]
"""Rows as token ids, each in one piece or several."""


def find_reader(computing: Computing) -> PreTrainedTokenizerBase | None:
    """Return what makes texts this model's tokens, or None, and note why losses cannot be told."""
    answerer = computing.answerer
    if isinstance(answerer, HFAnswerer):
        return answerer.tokenizer
    assert isinstance(answerer, GGUFAnswerer)
    reader = computing.wanted.reader
    if reader is None:
        computing.why_no_loss = (
            "a GGUF file does not tell which tokens are the answer's: name the adapter or model "
            "that it was made from beside it"
        )
    elif lack := llama_api.find_lack():
        computing.why_no_loss = lack
    elif other := _find_other_tokens(answerer, reader):
        computing.why_no_loss = f"it splits {other!r} into other tokens than the models beside it"
    else:
        return reader
    return None


def _find_other_tokens(answerer: GGUFAnswerer, reader: PreTrainedTokenizerBase) -> str | None:
    """Return a text that a GGUF file splits otherwise than a tokenizer; None where none was
    found."""
    for probe in make_probes(reader):
        if answerer.model.tokenize(probe.text, add_special=probe.plain) != probe.ids:
            return probe.text[:40]
    return None


def compute_losses(computing: Computing, reader: PreTrainedTokenizerBase) -> None:
    """Compute the loss of each row, and find the answers that need not be written."""
    rows = [row for row in computing.wanted.rows if row.has_answer]
    rows = [row for row in rows if not computing.is_bad(row)]
    kept = computing.kept
    if not kept.lacks([row.number for row in rows], "tokens", "no_loss"):
        return
    if token_losses.needs_template(reader, rows):
        ui.say(
            f"{computing.scored.label}: no loss: it has no chat template, by which rows are read"
        )
        kept.add([{"row": row.number, "no_loss": True} for row in rows])
        return
    made = _make_pieces(computing, reader, rows)
    lengths = [max(len(piece.ids) for piece in pieces) for _, pieces in made]
    places = token_losses.make_batches(lengths, computing.wanted.batch_size)
    batches = [[made[at] for at in some] for some in places]
    lacking = [batch for batch in batches if kept.lacks([row.number for row, _ in batch], "tokens")]
    if not lacking:
        return
    path = Path(computing.scored.path)
    # of all rows, whichever are known: what is computed after a kill is what would have been
    shared = token_losses.find_shared([piece for _, pieces in made for piece in pieces])
    with token_losses.open_reading(computing.answerer, path, max(lengths), shared) as reading:
        guesses = Guesses(computing.answerer, reading, computing.wanted.sampling)
        guesses.able &= computing.wanted.answers
        for done, batch in enumerate(lacking, 1):
            kept.add(_read_batch(reading, guesses, batch))
            computing.tell("batches of losses", done, len(lacking))


def _read_batch(reading: Reading, guesses: Guesses, batch: Made) -> list[dict[str, Any]]:
    """Return what a pass over rows tells of each, as it is kept: the loss per token, null where it
    is not finite, and whether it would be answered as expected."""
    marked = [(row, guesses.mark(row, pieces)) for row, pieces in batch]
    seen = iter(reading.read([piece for _, pieces in marked for piece in pieces]))
    records = []
    for row, pieces in marked:
        found = [next(seen) for _ in pieces]
        loss = token_losses.add_up([each.loss for each in found])
        mean = loss.total / loss.tokens
        kept = {"loss": mean if math.isfinite(mean) else None, "tokens": loss.tokens}
        records.append({"row": row.number, **kept, **guesses.tell(pieces[-1], found[-1])})
    return records


def _make_pieces(
    computing: Computing, reader: PreTrainedTokenizerBase, rows: Sequence[HeldRow]
) -> Made:
    """Return the rows that something is trained of, as token ids; refuse those that the model
    cannot read."""
    positions = computing.answerer.positions
    found, useless = [], []
    for row, pieces in zip(rows, token_losses.encode_rows(reader, computing.wanted.train_on, rows)):
        if isinstance(pieces, formats.BadRow):
            computing.refuse(row, pieces.said, "mend the row, or --on-bad-row skip")
            continue
        longest = max((len(piece.ids) for piece in pieces), default=0)
        if positions is not None and longest > positions:
            computing.refuse(
                row,
                f"{computing.scored.label} reads {positions} tokens, and the row has {longest}",
            )
        elif pieces:
            found.append((row, pieces))
        else:
            useless.append({"row": row.number, "no_loss": True})
    if useless:
        computing.kept.add(useless)
    return found


def compute_general(computing: Computing, reader: PreTrainedTokenizerBase) -> None:
    """Compute the loss on the general text."""
    pieces = forgetting.make_pieces(reader, computing.answerer.positions)
    size, longest = computing.wanted.batch_size, max(len(piece.ids) for piece in pieces)
    losses = list[Loss]()
    path = Path(computing.scored.path)
    with token_losses.open_reading(computing.answerer, path, longest) as reading:
        for start in range(0, len(pieces), size):
            losses += [seen.loss for seen in reading.read(pieces[start : start + size])]
    computing.kept.add([{"row": GENERAL, "general": forgetting.keep(losses)}])
