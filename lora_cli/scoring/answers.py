"""Make answers of the numbers that a model says of a row: labels with their probabilities, measured
values, tags of words and the entities that they mark, the part of a text that answers a question.

An answer is data as JSON has it. Probabilities are computed in double precision and rounded to the
seven digits that float32 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.scoring import losses
from lora_cli.scoring.metrics import find_entities, name_entities
from lora_cli.scoring.probabilities import Numbers, normalise, squash
from lora_cli.scoring.spans import Found, choose_answer

Answer = dict[str, Any]
Spans = Sequence[tuple[int, int]]
"""Where words begin and end: in the characters of a text, or counted in words."""
DIGITS = 7
"""What float32 holds of a number."""


def answer_labels(
    logits: NDArray[Any], labels: Sequence[str], problem_type: str | None, everything: bool = False
) -> list[Answer]:
    """Return what is said of each row whose logits (rows, labels) are given: `label` and its
    `probability`; where a row may have several, `labels`, which are those over one half, and
    `probabilities`; where values are measured, `value`, or `values` by their names.

    With `everything`, the probabilities of all labels.
    """
    values = np.asarray(logits, np.float64)
    if problem_type == losses.NUMBERS:
        return [_name_values(row, labels) for row in values]
    if problem_type == losses.SEVERAL:
        return [_choose_several(row, labels, everything) for row in squash(values)]
    return [_choose_one(row, labels, everything) for row in normalise(values)]


def _choose_one(probabilities: Numbers, labels: Sequence[str], everything: bool) -> Answer:
    best = int(probabilities.argmax())
    answer: Answer = {"label": labels[best], "probability": shorten(probabilities[best])}
    if everything:
        answer["probabilities"] = dict(zip(labels, map(shorten, probabilities)))
    return answer


def _choose_several(probabilities: Numbers, labels: Sequence[str], everything: bool) -> Answer:
    chosen = [label for label, each in zip(labels, probabilities) if each > 0.5]
    kept = {
        label: shorten(each)
        for label, each in zip(labels, probabilities)
        if everything or label in chosen
    }
    return {"labels": chosen, "probabilities": kept}


def _name_values(values: Numbers, labels: Sequence[str]) -> Answer:
    if len(values) == 1:
        return {"value": shorten(values[0])}
    return {"values": dict(zip(labels, map(shorten, values)))}


def shorten(number: float) -> float:
    """Return a number with as many digits as float32 has."""
    return float(f"{number:.{DIGITS}g}")


def answer_tags(
    logits: NDArray[Any],
    labels: Sequence[str],
    spans: Spans,
    read: Callable[[int, int], str],
    everything: bool = False,
) -> Answer:
    """Return what is said of the words of one row, whose logits (words, labels) are given with the
    place of each: `entities` with `type`, `text`, `start`, `end` (where it is over) and
    `probability`, the mean of its words'; where the labels mark no entities, or with `everything`,
    also `tags`, one for each word. `read` returns the text from one place to another."""
    probabilities = normalise(logits)
    best = probabilities.argmax(-1)
    tags = [labels[number] for number in best.tolist()]
    likely = [float(row[number]) for row, number in zip(probabilities, best)]
    answer: Answer = {}
    if name_entities(labels):
        answer["entities"] = [
            {
                "type": kind,
                **_place(read, spans[first][0], spans[last][1]),
                "probability": shorten(float(np.mean(likely[first : last + 1]))),
            }
            for kind, first, last in find_entities([tags])
        ]
    if everything or not answer:
        answer["tags"] = [
            {"tag": tag, **_place(read, *span), "probability": shorten(each)}
            for tag, span, each in zip(tags, spans, likely)
        ]
    return answer


def _place(read: Callable[[int, int], str], start: int, end: int) -> Answer:
    return {"text": read(start, end), "start": start, "end": end}


def answer_question(windows: Sequence[Found], context: str, everything: bool = False) -> Answer:
    """Return the part of `context` that answers a question, by what was found in each window over
    it: `answer`, its place as `start` and `end`, and its `probability` in its window. All three
    are null where there being no answer scores higher, and `probability` is that of there being
    none. With `everything`, also the best of each window, as `windows`, with that of none."""
    best = choose_answer(windows, may_be_none=True)
    if best is not None:
        answer = _quote(best, context)
    else:
        none = min(windows, key=lambda found: found.none)
        likely = shorten(none.none_probability)
        answer = {"answer": None, "start": None, "end": None, "probability": likely}
    if everything:
        answer["windows"] = [
            {**_quote(found, context), "none": shorten(found.none_probability)} for found in windows
        ]
    return answer


def _quote(found: Found, context: str) -> Answer:
    return {
        "answer": context[found.start : found.end],
        "start": found.start,
        "end": found.end,
        "probability": shorten(found.probability),
    }
