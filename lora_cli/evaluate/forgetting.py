"""What a training has made a model forget: its loss on a text that has nothing to do with the data.

The text, `general_text.txt`, is of this project and has its licence (Apache-2.0): prose on several
subjects, a dialogue, a letter, code, and a few lines of German, French, Spanish and Chinese, in
passages between lines of `%%`. It was written for this, so no model was trained on it before it was
published here. Each passage is read as plain text, without a chat template.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.evaluate.token_losses import Loss, Piece
from lora_cli.scoring import bootstrap

FILE = Path(__file__).with_name("general_text.txt")
LONGEST = 512
"""Tokens of a passage that are read."""


@cache
def read_passages() -> tuple[str, ...]:
    """Return the passages of the text."""
    return tuple(part.strip() for part in FILE.read_text(encoding="utf-8").split("\n%%\n"))


def make_pieces(tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[Piece]:
    """Return the passages as token ids; each token but the first is foretold."""
    made = []
    for passage in read_passages():
        ids = list(tokenizer(passage)["input_ids"])[: min(LONGEST, positions or LONGEST)]
        made.append(Piece(ids, list(ids)))
    return made


def describe(losses: list[Any] | None, of_base: list[Any] | None) -> dict[str, Any] | None:
    """Return the loss per token on the text, as evaluation.json has it, with how much higher it is
    than that of the base where both read the same tokens; None where it was not computed."""
    if losses is None:
        return None
    own = _count(losses)
    found = bootstrap.find_interval(own)
    described: dict[str, Any] = {
        "loss": found.value,
        "low": found.low,
        "high": found.high,
        "tokens": int(own[:, 1].sum()),
        "difference": None,
        "passages": losses,
    }
    if of_base is not None and of_base is not losses:
        base = _count(of_base)
        if base.shape == own.shape and (base[:, 1] == own[:, 1]).all():
            described["difference"] = bootstrap.compare(base, own).to_data()
    return described


def keep(losses: list[Loss]) -> list[list[float]]:
    """Return losses as JSON keeps them; a loss that is not finite is null."""
    return [[each.total if np.isfinite(each.total) else None, each.tokens] for each in losses]  # type: ignore[list-item]


def _count(losses: list[Any]) -> bootstrap.Numbers:
    return np.array(losses, np.float64)  # null becomes NaN
