"""What every answerer is asked, and how it answers, whatever form its model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from lora_cli.models import decoder

Messages = list[dict[str, Any]]
COLDEST = 1e-9
"""The least temperature that differs from 0: below it even logits that lie one step of float32
apart, 1e-7 about 1, are e^-100 in probability, and the others overflow."""


class Asked(NamedTuple):
    """A conversation that waits for an answer, and the tools that may be called in it."""

    messages: Messages
    tools: list[Any] | None = None


class Sampling(NamedTuple):
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLDEST


class Answerer(Protocol):
    """Anything that answers conversations by its `chat_template`."""

    @property
    def chat_template(self) -> str | None:
        """The template, as text."""

    @property
    def reads_tools(self) -> bool:
        """Whether its template shows the tools that may be called."""

    def answer(self, conversations: Sequence[Asked], sampling: Sampling) -> list[str]:
        """One answer each."""

    def write(self, conversations: Sequence[Asked], sampling: Sampling) -> list[decoder.Written]:
        """One answer each, with whether it ended by itself; all that are given are one batch."""

    def encode(self, asked: Asked) -> list[int]:
        """The tokens that the model reads before it answers."""

    def read(self, ids: Sequence[int]) -> str:
        """The text of a whole answer that has these tokens, the last of which ends it."""

    @property
    def takes_likeliest(self) -> bool:
        """Whether a greedy answer is the likeliest token each time, and nothing weighs it first."""

    @property
    def positions(self) -> int | None:
        """How many tokens prompt and answer may have together; None where nothing limits it."""

    def stream(self, conversation: Asked, sampling: Sampling) -> str:
        """Print one answer to stdout as it comes, and return it."""
