"""Read what rows have of questions: the question, the text that is to have its answer, and the
answers with their places, which are compared with the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.common import spell_count
from lora_cli.data import formats
from lora_cli.data.encode import refuse_half_characters
from lora_cli.data.formats import BadRow

SHOWN = 40
"""Characters of a text that a message shows."""
FIELDS = ("text", "answer_start")
NONE = "a question without an answer has an empty list: answers: []"


class Answer(NamedTuple):
    """A piece of a text, and where it begins in it, in characters."""

    text: str
    start: int

    @property
    def span(self) -> tuple[int, int]:
        """Where it begins and ends, without the blanks around it."""
        start = self.start + len(self.text) - len(self.text.lstrip())
        return start, start + len(self.text.strip())


class Asked(NamedTuple):
    """A question, the text that is to have its answer, and all answers that are right."""

    question: str
    context: str
    answers: list[Answer]


def convert_asked(row: Mapping[str, Any]) -> Asked:
    """Return a row's question, its text and its answers; raise BadRow for an answer that is not
    where the row says."""
    question = formats.get_filled_text(row, "question")
    context = formats.get_filled_text(row, "context")
    refuse_half_characters(question + context)
    answers = read_answers(formats.get_value(row, "answers"))
    _refuse_other_than_said(row.get("is_impossible"), answers)
    for answer in answers:
        _refuse_misplaced(answer, context)
    return Asked(question, context, answers)


def read_answers(value: Any) -> list[Answer]:
    """Return answers that are given as `{text: [...], answer_start: [...]}`, as a list of
    `{text, answer_start}`, or as either in JSON; raise BadRow for anything else."""
    if isinstance(value, str):
        try:
            value = formats.parse_json(value)
        except (ValueError, RecursionError):
            raise BadRow(
                "answers are text",
                "answers are text, but must be a list of {text, answer_start}",
                NONE,
            ) from None
    if isinstance(value, dict):
        value = _read_columns(value)
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise BadRow(
            f"answers are {kind}",
            f"answers are {str(value)[:SHOWN]}, but must be a list of {{text, answer_start}}",
            NONE,
        )
    return [_read_answer(each) for each in value]


def _read_columns(value: Mapping[str, Any]) -> list[Any]:
    """Return answers in columns one by one."""
    given = [value.get(name, []) for name in FIELDS]
    columns = [each if isinstance(each, list) else [each] for each in given]
    if len(columns[0]) != len(columns[1]):
        raise BadRow(
            "there is not one answer_start for each answer",
            f"there are {spell_count(len(columns[0]), 'text')} of answers and {len(columns[1])} "
            "answer_start",
        )
    return [dict(zip(FIELDS, each)) for each in zip(*columns)]


def _read_answer(value: Any) -> Answer:
    text = value.get("text") if isinstance(value, dict) else None
    start = value.get("answer_start") if isinstance(value, dict) else None
    if not isinstance(text, str) or type(start) is not int:
        raise BadRow(
            "an answer is no {text, answer_start}",
            f"an answer is {json.dumps(value, default=str)[:SHOWN]}, not {{text, answer_start}}",
        )
    if not text.strip():
        raise BadRow("an answer is empty", hint=NONE)
    return Answer(text, start)


def _refuse_other_than_said(impossible: Any, answers: Sequence[Answer]) -> None:
    """Raise BadRow where `is_impossible` is there and says otherwise than the answers."""
    if impossible is None or impossible == "":
        return
    said = {"true": True, "false": False, "1": True, "0": False}.get(str(impossible).lower())
    if said is None:
        shown = json.dumps(impossible, default=str)[:SHOWN]
        raise BadRow("is_impossible is not true or false", f"is_impossible is {shown}")
    if said and answers:
        raise BadRow(
            "an impossible question has an answer",
            f"is_impossible is true, and there is the answer {answers[0].text[:SHOWN]!r}",
        )
    if not said and not answers:
        raise BadRow("is_impossible is false, and there is no answer")


def _refuse_misplaced(answer: Answer, context: str) -> None:
    """Raise BadRow where an answer does not stand where it is said to; it tells where it does."""
    text, start = answer
    if start >= 0 and context.startswith(text, start):
        return
    found = sorted(_find_all(text, context), key=lambda place: abs(place - start))
    there = context[start : start + len(text)][:SHOWN] if start >= 0 else ""
    where = f"stands at {found[0]}" if found else "is nowhere in the context"
    instead = f", where {there!r} stands" if there else ""
    hint = formats.MEND
    if found and context.encode()[max(start, 0) :].startswith(text.encode()):
        hint = "answer_start counts characters, and not bytes"
    elif found and found[0] == start - 1:
        hint = "answer_start counts characters from 0"
    raise BadRow(
        "an answer is not at its answer_start",
        f"the answer {text[:SHOWN]!r} is not at answer_start {start}{instead}: it {where}",
        hint,
    )


def _find_all(text: str, context: str) -> Iterator[int]:
    place = context.find(text)
    while place >= 0:
        yield place
        place = context.find(text, place + 1)
