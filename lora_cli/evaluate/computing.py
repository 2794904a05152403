"""One model that is scored: what is wanted of it, what is known, how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, ui
from lora_cli.evaluate.answerers import Answerer, Sampling
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.evaluate.kept_scores import GENERAL, Kept
from lora_cli.evaluate.scored_models import Scored

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
