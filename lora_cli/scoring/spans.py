"""Score answers that are sought in texts: where they begin and end, and the texts they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lora_cli.models import IGNORED
from lora_cli.recipe import Recipe
from lora_cli.scoring import metrics
from lora_cli.scoring.metrics import Scores
from lora_cli.scoring.probabilities import normalise
from lora_cli.scoring.scorer import Beside, Scorer

Numbers = NDArray[np.float32]
Places = NDArray[np.int64]


class Span(NamedTuple):
    """The first and the last token of an answer, and the sum of their logits."""

    first: int
    last: int
    score: float


class Found(NamedTuple):
    """The likeliest answer in one window over a text: where it begins and ends, in characters."""

    start: int
    end: int
    score: float
    probability: float
    """That it begins and ends there, of all tokens of the window."""
    none: float
    """The score of there being no answer, to compare with the other."""
    none_probability: float


class Said(NamedTuple):
    """What is said of one window over a question's text."""

    question: int
    """The number of its row."""
    text: str
    """The likeliest answer."""
    score: float
    none: float
    """The score of there being no answer, to compare with the other."""
    accepted: list[str]
    """The answers that are right; none where the text has none."""


class AnswerScorer(Scorer):
    """Scores models that answer questions: `logits` (rows, length, 2) that an answer begins, and
    ends, at a token; `labels` (rows, 2) are the tokens where it does."""

    def __init__(
        self, labels: Sequence[str] = (), problem_type: str | None = None, longest: int = 30
    ) -> None:
        super().__init__(labels, problem_type)
        self.longest = longest

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> AnswerScorer:
        """Return the scorer for a settled recipe."""
        return cls(longest=recipe.data.longest_answer)

    def sum_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the cross-entropy of both places among a row's tokens; transformers' models also
        count padding, so that a row's loss would depend on the rows beside it."""
        kept = torch.ones_like(logits[..., :1], dtype=torch.bool)
        if mask is not None:
            kept = mask[..., None] != 0
        found = logits.float().masked_fill(~kept, -torch.inf).log_softmax(1)
        total = functional.nll_loss(found, labels, reduction="sum", ignore_index=IGNORED)
        if not smoothing:
            return total
        means = -found.where(kept, 0.0).sum(1) / kept.sum(1)
        return (1 - smoothing) * total + smoothing * (means * (labels != IGNORED)).sum()

    def make_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return that no row has an answer."""
        return logits.new_zeros((len(logits), 2), dtype=torch.long)

    def read(self, logits: torch.Tensor, labels: torch.Tensor, beside: Beside) -> list[Any]:
        """Return the likeliest answer of each window, as text."""
        known = (labels != IGNORED).all(1).nonzero()[:, 0].tolist()
        return [
            _read_window(
                logits[at].numpy(),
                {name: values[at].numpy() for name, values in beside.items()},
                self.longest,
            )
            for at in known
        ]

    def score_all(self, gathered: list[Any]) -> Scores:
        """Return exact match and F1 of the best answers of all windows of each question. There may
        be none only where that is right for some question."""
        windows: dict[int, list[Said]] = {}
        for said in map(Said._make, gathered):
            windows.setdefault(said.question, []).append(said)
        accepted = [each[0].accepted for each in windows.values()]
        may_be_none = not all(accepted)
        best = [choose_answer(each, may_be_none) for each in windows.values()]
        return metrics.score_answers([said.text if said else "" for said in best], accepted)


Window = TypeVar("Window", Said, Found)


def choose_answer(windows: Sequence[Window], may_be_none: bool) -> Window | None:
    """Return the window over a text with the best answer; None where there being none scores higher
    in that window where it scores lowest, as SQuAD's own baseline has it."""
    best = max(windows, key=lambda said: said.score)
    none = min(said.none for said in windows)
    return None if may_be_none and none > best.score else best


def find_span(begins: Numbers, ends: Numbers, allowed: NDArray[np.bool_], longest: int) -> Span:
    """Return the best answer of up to `longest` tokens that all are `allowed`, by the logits
    (length,) that it begins and ends at each; the score is -inf where none is."""
    first, last = (np.where(allowed, each, -np.inf) for each in (begins, ends))
    best = Span(0, 0, -np.inf)
    for more in range(min(longest, len(first))):
        scores = first[: len(first) - more] + last[more:]
        at = int(scores.argmax())
        if scores[at] > best.score:
            best = Span(at, at + more, float(scores[at]))
    return best


def find_answer(logits: Numbers, starts: Places, ends: Places, longest: int) -> Found:
    """Return the best answer in a window by the logits (tokens, 2) that it begins, and ends, at
    each token; `starts` and `ends` are where these stand in the text, -1 for those that do not."""
    likely = normalise(logits.T)
    begins_at, ends_at = logits.T
    span = find_span(begins_at, ends_at, starts >= 0, longest)
    return Found(
        int(starts[span.first]),
        int(ends[span.last]),
        span.score,
        float(likely[0, span.first] * likely[1, span.last]),
        float(logits[0].sum()),
        float(likely[0, 0] * likely[1, 0]),
    )


def _read_window(logits: Numbers, beside: dict[str, Places], longest: int) -> Said:
    """Return what is said of a window, whose columns are those of `data.questions`."""
    starts, ends = beside["starts"], beside["ends"]
    found = find_answer(logits[: len(starts)], starts, ends, longest)
    base = starts[starts >= 0].min()
    context, accepted = (bytes(column[column >= 0].tolist()).decode() for column in
                         (beside["context"], beside["answers"]))  # fmt: skip
    text = context[found.start - base : found.end - base]
    return Said(int(beside["question"][0]), text, found.score, found.none, json.loads(accepted))
