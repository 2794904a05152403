"""Answers that need not be written: where a model likes each token of the expected answer best, by
a clear margin, that answer is what it would write greedily, token by token. One pass over prompt
and answer tells, the same that gives the loss. Where no loss is wanted answers are written: a pass
for this alone was measured not to pay on CPUs, where llama.cpp reads but twice as fast as it
writes.

Written and read, logits differ a little: kernels depend on how many tokens come at once, and
llama.cpp's server keeps keys and values as float16. An answer that hangs on less than `MARGIN`
anywhere is written. Verifying a guess by one pass is speculative decoding's step (Leviathan et al.,
2023, arXiv 2211.17192), with the expected answer as the whole guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_cli.evaluate.answerers import Answerer, Sampling
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.evaluate.token_losses import Piece, Reading, Seen

MARGIN = 1.0
"""In logits, so that of two tokens the likelier is e times as likely."""


class Guesses:
    """The expected answers of rows, as one model would write them."""

    def __init__(self, answerer: Answerer, reading: Reading, sampling: Sampling) -> None:
        self.answerer, self.reading, self.sampling = answerer, reading, sampling
        self.able = sampling.is_greedy and answerer.takes_likeliest

    def mark(self, row: HeldRow, pieces: Sequence[Piece]) -> list[Piece]:
        """Return a row's pieces, the expected answer marked in the last where the model could write
        just that: it follows what the model is asked, ends, and has room."""
        if not self.able or row.question is None or row.expected is None or not pieces:
            return list(pieces)
        *before, last = pieces
        prompt = self.answerer.encode(row.question.asked(self.answerer.chat_template))
        if last.ids[: len(prompt)] != prompt:
            return list(pieces)
        length = self._find_length(last.ids[len(prompt) :])
        if length is None or length > self._find_room(len(prompt)):
            return list(pieces)
        start = len(prompt) - 1
        return [*before, replace(last, answer=range(start, start + length))]

    def _find_length(self, ids: Sequence[int]) -> int | None:
        """Return how many tokens an answer has, with the one that ends it; None where nothing ends
        it, or a token of it is left out of its text."""
        for at, token in enumerate(ids):
            if self.reading.ends_answer(token):
                return at + 1
            if self.reading.leaves_out(token):
                return None
        return None

    def _find_room(self, length: int) -> int:
        positions, most = self.answerer.positions, self.sampling.max_new_tokens
        return most if positions is None else min(most, positions - length)

    def tell(self, piece: Piece, seen: Seen) -> dict[str, Any]:
        """Return what is known of a row's answer after a pass, as it is kept; nothing where no
        answer is guessed."""
        if not self.able:
            return {}
        if not piece.answer or seen.margin < MARGIN:
            return {"foreseen": False}
        ids = piece.ids[piece.answer.start + 1 : piece.answer.stop + 1]
        return {"foreseen": True, "answer": self.answerer.read(ids), "ended": True}
