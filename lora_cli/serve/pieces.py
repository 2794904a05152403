"""An answer as it comes: its text in pieces, cut before a stop string, with the tokens of each.

The pieces put together are the text that `lora generate` prints: each token's text is that of all
tokens so far, decoded at once, less what was there before. What a later token may change is held
back: half a character, characters whose bytes are tokens until another token comes (half a one at
their end makes all of them unreadable), the beginning of a stop string, the last word where a
tokenizer moves its spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"
"""What stands for bytes that are no whole character yet."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""What vocabularies with a token for each byte call these."""


class Drawing(NamedTuple):
    """How an answer is drawn, and where it ends."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """How many likely tokens are told of beside each; None: no log-probabilities at all."""


class Likely(NamedTuple):
    """A token, its natural-log probability, and its bytes, None where it is no whole text."""

    text: str
    logprob: float
    data: bytes | None


class Token(NamedTuple):
    """A token of an answer, and those that were likeliest in its place."""

    chosen: Likely
    top: list[Likely]


class Piece(NamedTuple):
    """A part of an answer; its tokens are those whose text begins in it."""

    text: str
    tokens: list[Token]


class End(NamedTuple):
    """Why an answer ended (`stop`, `length`), how many tokens were computed for it, the one that
    ended it too, and its text."""

    reason: str
    num_tokens: int
    text: str


Emit = Callable[[Piece], None]


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Return where the first stop string in a text begins, looking from `start`; -1 for none."""
    found = [place for stop in stops if (place := text.find(stop, max(start, 0))) >= 0]
    return min(found, default=-1)


def measure_open(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0)
    return next(
        (
            length
            for length in range(min(longest - 1, len(text)), 0, -1)
            if any(stop.startswith(text[-length:]) for stop in stops)
        ),
        0,
    )


class Assembler:
    """Makes pieces of tokens. `text` is the answer so far, before any stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], emit: Emit
    ) -> None:
        self.tokenizer, self.stops, self.emit = tokenizer, stops, emit
        self.moves_spaces = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self.ids: list[int] = []
        self.text = ""
        self.sent = ""
        self.spelt_from: int | None = None
        """Where the text of the last tokens begins, if these are bytes."""
        self.waiting: list[tuple[int, Token]] = []
        """Tokens that are in no piece yet, with the place of each one's text."""

    def add(self, token: int, told: Token | None) -> bool:
        """Take a token; return whether a stop string ends the answer in it."""
        before, text = len(self.text), self.text
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))):
            self.spelt_from = before if self.spelt_from is None else self.spelt_from
        elif self.text != text:
            self.spelt_from = None
        if told is not None:
            self.waiting.append((before if self.spelt_from is None else self.spelt_from, told))
        # what was decoded may have changed by a few characters before its end
        looked = before - max(map(len, self.stops), default=0) - len(HALF) * 4
        cut = find_stop(self.text, self.stops, looked)
        if cut >= 0:
            self.text = self.text[:cut]
            self._send(self.text, last=False)
            return True
        self._send(self.text[: self._measure_certain()], last=False)
        return False

    def end(self, stopped: bool) -> None:
        """Send what was held back; of tokens that a stop string cut off, nothing."""
        self._send(self.text, last=not stopped)

    def _measure_certain(self) -> int:
        """Return how much of the text no later token can change."""
        certain = len(self.text.rstrip(HALF))
        if self.spelt_from is not None:
            certain = min(certain, self.spelt_from)
        if self.moves_spaces:
            certain = min(certain, max(self.text.rfind(" "), 0))
        return min(certain, len(self.text) - measure_open(self.text, self.stops))

    def _send(self, text: str, last: bool) -> None:
        if len(text) < len(self.sent) or not text.startswith(self.sent):
            return  # shorter than what is out already: nothing new is certain
        ready = [token for place, token in self.waiting if last or place < len(text)]
        if text == self.sent and not (last and ready):
            return
        self.waiting = self.waiting[len(ready) :]
        self.emit(Piece(text[len(self.sent) :], ready))
        self.sent = text


def name_token(
    tokenizer: PreTrainedTokenizerBase, token: int, logprob: float, before: int | None
) -> Likely:
    """Return a token with the text that it stands for behind the token `before`: at the beginning
    of a text some tokenizers leave a space out."""

    def read(*ids: int) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    text = read(token)
    if before is not None and HALF not in text:
        first, both = read(before), read(before, token)
        text = both[len(first) :] if both.startswith(first) else text
    return Likely(text, logprob, None if HALF in text else text.encode())
