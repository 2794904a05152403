"""Compute what is not yet known of a model's rows: losses, answers, and the loss on the general
text. Each batch is written down as it comes.

Batches are made of all rows, whatever is known already, and one of which a row lacks is computed
whole: so what a killed evaluation goes on with is what it would have computed. A drawn answer (with
a temperature) is computed alone, from a seed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, set_seed

from lora_cli.common import LoraError, ui
from lora_cli.data import formats
from lora_cli.evaluate import forgetting, token_losses
from lora_cli.evaluate.answerers import Answerer, GGUFAnswerer, HFAnswerer, Sampling
from lora_cli.evaluate.held_out import HeldRow, list_numbers
from lora_cli.evaluate.kept_scores import GENERAL, Kept
from lora_cli.evaluate.scored_models import Scored
from lora_cli.evaluate.token_losses import Loss, Piece
from lora_cli.gguf import llama_api
from lora_cli.models import make_probes

MEND = "shorten the row, or --on-bad-row skip"


class Wanted(NamedTuple):
    """What is to be known of each model."""

    rows: Sequence[HeldRow]
    losses: bool
    answers: bool
    general: bool
    sampling: Sampling
    batch_size: int
    train_on: str
    """Which turns carry loss, as data.train_on."""
    skips_bad: bool
    reader: PreTrainedTokenizerBase | None
    """What reads for a model in whose place a GGUF file stands; None where there is none."""


@dataclass
class Computing:
    """One model at work."""

    scored: Scored
    answerer: Answerer
    wanted: Wanted
    kept: Kept
    progress: ui.Progress = field(default_factory=ui.Progress)
    why_no_loss: str | None = None

    def refuse(self, row: HeldRow, said: str, hint: str = MEND) -> None:
        """Raise LoraError for a row that this model cannot be asked, or note it where such rows are
        skipped."""
        if not self.wanted.skips_bad:
            raise LoraError(f"{row.place}: {said}", hint)
        self.kept.add([{"row": row.number, "error": said}])

    def is_bad(self, row: HeldRow) -> bool:
        """Return whether the row was skipped."""
        return "error" in self.kept.get(row.number)

    def tell(self, what: str, done: int, of: int) -> None:
        """Say how far it is."""
        self.progress.update(f"{self.scored.label}: {done:,} of {of:,} {what}")


def is_known(wanted: Wanted, kept: Kept) -> bool:
    """Return whether all is known of a model that was asked for."""
    asked = [row.number for row in wanted.rows if row.question]
    learnt = [row.number for row in wanted.rows if row.has_answer]
    return not (
        (wanted.answers and kept.lacks(asked, "answer"))
        or (wanted.losses and kept.lacks(learnt, "tokens", "no_loss"))
        or (wanted.general and kept.get(GENERAL).get("general") is None)
    )


def compute(computing: Computing) -> None:
    """Compute all that is wanted and not known."""
    reader = _find_reader(computing)
    if reader is None:
        ui.say(f"{computing.scored.label}: no loss: {computing.why_no_loss}")
    else:
        if computing.wanted.losses:
            _compute_losses(computing, reader)
        if computing.wanted.general and computing.kept.get(GENERAL).get("general") is None:
            _compute_general(computing, reader)
    if computing.wanted.answers:
        _compute_answers(computing)
    computing.progress.clear()


def _find_reader(computing: Computing) -> PreTrainedTokenizerBase | None:
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
    elif lack := _find_lack_of_logits():
        computing.why_no_loss = lack
    elif other := _find_other_tokens(answerer, reader):
        computing.why_no_loss = f"it splits {other!r} into other tokens than the models beside it"
    else:
        return reader
    return None


def _find_lack_of_logits() -> str | None:
    """Return why llama.cpp's logits cannot be read here; None where they can."""
    try:
        llama_api.load_api()
    except LoraError as error:
        return error.message
    return None


def _find_other_tokens(answerer: GGUFAnswerer, reader: PreTrainedTokenizerBase) -> str | None:
    """Return a text that a GGUF file splits otherwise than a tokenizer; None where none was
    found."""
    for probe in make_probes(reader):
        if answerer.model.tokenize(probe.text, add_special=probe.plain) != probe.ids:
            return probe.text[:40]
    return None


def _compute_losses(computing: Computing, reader: PreTrainedTokenizerBase) -> None:
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
    batches = [
        [made[at] for at in places]
        for places in token_losses.make_batches(lengths, computing.wanted.batch_size)
    ]
    lacking = [batch for batch in batches if kept.lacks([row.number for row, _ in batch], "tokens")]
    losses = _walk(computing, [[each for _, some in batch for each in some] for batch in lacking])
    for done, batch in enumerate(lacking, 1):
        summed = [token_losses.add_up([next(losses) for _ in pieces]) for _, pieces in batch]
        kept.add([_describe(row, loss) for (row, _), loss in zip(batch, summed)])
        computing.tell("batches of losses", done, len(lacking))


def _make_pieces(
    computing: Computing, reader: PreTrainedTokenizerBase, rows: Sequence[HeldRow]
) -> list[tuple[HeldRow, list[Piece]]]:
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


def _describe(row: HeldRow, loss: Loss) -> dict[str, Any]:
    """Return a row's loss as it is kept: per token; one that is not finite is null."""
    mean = loss.total / loss.tokens
    kept = mean if math.isfinite(mean) else None
    return {"row": row.number, "loss": kept, "tokens": loss.tokens}


def _walk(computing: Computing, batches: Sequence[Sequence[Piece]]) -> Iterator[Loss]:
    """Yield the loss of each piece; llama.cpp opens the file once for all."""
    if isinstance(computing.answerer, HFAnswerer):
        for batch in batches:
            yield from token_losses.sum_losses(computing.answerer, batch)
    elif batches:
        pieces = [piece for batch in batches for piece in batch]
        yield from token_losses.walk_gguf_losses(Path(computing.scored.path), pieces)


def _compute_general(computing: Computing, reader: PreTrainedTokenizerBase) -> None:
    pieces = forgetting.make_pieces(reader, computing.answerer.positions)
    size = computing.wanted.batch_size
    batches = [pieces[start : start + size] for start in range(0, len(pieces), size)]
    losses = list(_walk(computing, batches))
    computing.kept.add([{"row": GENERAL, "general": forgetting.keep(losses)}])


def _compute_answers(computing: Computing) -> None:
    wanted, kept, answerer = computing.wanted, computing.kept, computing.answerer
    rows = [row for row in wanted.rows if row.question and not computing.is_bad(row)]
    if not kept.lacks([row.number for row in rows], "answer"):
        return
    alone = not wanted.sampling.is_greedy
    batches, done = _batch_answers(computing, rows), 0
    for batch in batches:
        done += len(batch)
        if kept.lacks([row.number for row in batch], "answer"):
            if alone:
                set_seed(batch[0].number)
            asked = [row.question.asked(answerer.chat_template) for row in batch if row.question]
            written = answerer.write(asked, wanted.sampling)
            kept.add(
                [
                    {"row": row.number, "answer": each.text, "ended": each.is_whole}
                    for row, each in zip(batch, written)
                    if kept.lacks([row.number], "answer")
                ]
            )
        computing.tell("answers", done, sum(map(len, batches)))


def _batch_answers(computing: Computing, rows: Sequence[HeldRow]) -> list[list[HeldRow]]:
    """Return rows in batches of prompts of about one length. A row after which the model has less
    than room for a whole answer is alone: the room would be that of the batch's longest."""
    answerer, wanted = computing.answerer, computing.wanted
    positions = answerer.positions
    fitting, alone, lengths = [], [], []
    for row in rows:
        assert row.question is not None
        length = answerer.count_tokens(row.question.asked(answerer.chat_template))
        room = None if positions is None else positions - length
        if room is not None and room < 1:
            label = computing.scored.label
            computing.refuse(
                row, f"{label} reads {positions} tokens, and the prompt alone has {length}"
            )
        elif room is not None and room < wanted.sampling.max_new_tokens:
            alone.append([row])
        else:
            fitting.append(row)
            lengths.append(length)
    size = wanted.batch_size if wanted.sampling.is_greedy else 1
    batches = token_losses.make_batches(lengths, size)
    return [*alone, *([fitting[at] for at in places] for places in batches)]


def warn_of_answers(scored: Scored, wanted: Wanted, kept: Kept) -> int:
    """Warn of what is odd in a model's answers and losses; return how many answers did not end."""
    numbers = [row.number for row in wanted.rows]
    cut = [n for n in numbers if kept.get(n).get("ended") is False]
    most = wanted.sampling.max_new_tokens
    told = {
        f"answers did not end within {most} tokens (--max-new-tokens)": cut,
        "answers are empty": [n for n in numbers if not kept.get(n).get("answer", "-").strip()],
        "rows have a loss that is not finite": [
            n for n in numbers if kept.get(n).get("loss", 0.0) is None
        ],
        "rows are left out": [n for n in numbers if "error" in kept.get(n)],
    }
    for what, found in told.items():
        if found:
            ui.warn(
                f"{scored.label}: {len(found)} of {len(numbers)} {what}: "
                f"{list_numbers(wanted.rows, found)}"
            )
    general = kept.get(GENERAL).get("general") or []
    if any(total is None for total, _ in general):
        ui.warn(f"{scored.label}: its loss on the general text is not finite")
    return len(cut)
