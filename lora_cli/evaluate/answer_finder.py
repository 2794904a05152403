"""Find the answers to questions in texts: the predictor of models that answer questions.

A long text is read in windows, as in training; the answer is the best of all of them, or that there
is none, by the rule that an evaluation goes by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lora_cli.common import spell_count
from lora_cli.data import asked, collate, encode, formats, questions
from lora_cli.evaluate.opened import Opened
from lora_cli.evaluate.predictors import (
    Asked,
    Layout,
    Reading,
    Ready,
    find_unfinished,
    is_told,
    make_layouts,
    make_recipe,
    refuse_length,
)
from lora_cli.models import IGNORED
from lora_cli.recipe import Recipe
from lora_cli.scoring import answers, find_scorer, spans

Window = dict[str, Any]
"""What is fed to a model of a part of a text, and what is beside it."""


class Question(NamedTuple):
    """A question that is ready to be fed."""

    context: str
    windows: list[Window]


class AnswerFinder:
    """Answers with a part of the text and its place, or that it has no answer."""

    expected: ClassVar[str] = "answers"
    shown: ClassVar[tuple[str, ...]] = ("question",)
    layouts: ClassVar[Sequence[Layout]] = make_layouts(questions.QuestionEncoder, expected)

    def __init__(self, model: Opened, reading: Reading) -> None:
        self.model, self.reading = model, reading
        recipe = _limit_stride(make_recipe(model, reading, "stride", "longest_answer"))
        self.longest = recipe.data.longest_answer
        self.encoder = questions.QuestionEncoder(model.tokenizer, recipe)
        self.collate = collate.TaskCollator(
            model.tokenizer, by_token=False, measured=False, beside=self.encoder.beside
        )
        self.scorer = find_scorer(model.task).of_recipe(recipe)
        self.asked = 0
        self.have_answers = True
        self.of_none = 0

    @property
    def limit(self) -> int:
        """How many tokens a window may have."""
        return self.encoder.limit

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return the windows of each row, with the answers where they are told."""
        found: list[Ready | formats.BadRow | None] = [None] * len(rows)
        good: list[tuple[str, asked.Asked]] = []
        told: dict[int, list[str] | None] = {}
        for at, row in enumerate(rows):
            try:
                question, told[at] = self._convert(row)
                good.append((row.place, question))
            except formats.BadRow as bad:
                found[at] = bad
        for _, made in self.encoder.encode([good]):
            for at, (_, question), given in zip(told, good, made):
                found[at] = self._finish(given, question.context, told[at])
        return [each for each in found if each is not None]

    def _convert(self, row: Asked) -> tuple[asked.Asked, list[str] | None]:
        """Return a question with its text, and the answers that are right where they are told."""
        right = row.row.get(self.expected)
        known = is_told(right) and self.reading.with_labels
        given = {**row.row, self.expected: right if known else []}
        if not known:
            given.pop("is_impossible", None)
        question = asked.convert_asked(given)
        texts = [each.text for each in question.answers]
        return question._replace(answers=[]), texts if known else None

    def _finish(
        self, given: list[encode.Encoded] | formats.BadRow, context: str, right: list[str] | None
    ) -> Ready | formats.BadRow:
        """Return a question ready to be fed. An answer's place is not needed, only its text."""
        if isinstance(given, formats.BadRow):
            return given
        longest = max(len(window.input_ids) for window in given)
        try:
            refuse_length(longest, self.limit)
        except formats.BadRow as bad:
            return bad
        self.asked += 1
        beside = {
            "labels": [IGNORED if right is None else 0] * 2,
            "question": [self.asked],
            "answers": list(json.dumps(right or []).encode()),
        }
        windows = [
            {"input_ids": window.input_ids.tolist(), **_list_columns(window.others), **beside}
            for window in given
        ]
        return Ready(longest, Question(context, windows))

    def answer(self, batch: Sequence[Ready]) -> list[answers.Answer | formats.BadRow]:
        """Return the answers in the texts of rows; their windows are computed so many at a time as
        rows may be."""
        asking: list[Question] = [row.content for row in batch]
        windows = [window for question in asking for window in question.windows]
        said: list[spans.Found | formats.BadRow] = []
        for start in range(0, len(windows), self.reading.batch_size):
            said += self._read(windows[start : start + self.reading.batch_size])
        found = iter(said)
        return [
            self._choose(question, [next(found) for _ in question.windows]) for question in asking
        ]

    def _read(self, windows: Sequence[Window]) -> list[spans.Found | formats.BadRow]:
        """Return the best answer in each window."""
        given = self.collate(windows)
        labels, beside = given.pop("labels"), given.pop(collate.BESIDE)
        logits = self.model.compute(given)
        bad = find_unfinished(self.model, logits)
        kept = [at for at, each in enumerate(bad) if each is None]
        kept_beside = {name: values[kept] for name, values in beside.items()}
        self.scorer.add(logits[kept], labels[kept], kept_beside)
        places = [(np.array(each["starts"]), np.array(each["ends"])) for each in windows]
        return [
            each or spans.find_answer(of_row[: len(starts)].numpy(), starts, ends, self.longest)
            for each, of_row, (starts, ends) in zip(bad, logits, places)
        ]

    def _choose(
        self, question: Question, said: Sequence[spans.Found | formats.BadRow]
    ) -> answers.Answer | formats.BadRow:
        """Return the answer to a question by what was found in the windows over its text."""
        found = [each for each in said if isinstance(each, spans.Found)]
        if len(found) < len(said):
            return next(each for each in said if isinstance(each, formats.BadRow))
        answer = answers.answer_question(found, question.context, self.reading.everything)
        if question.windows[0]["labels"][0] != IGNORED:
            self.have_answers &= question.windows[0]["answers"] != NO_ANSWERS
            self.of_none += answer["answer"] is None
        return answer

    def list_notes(self) -> list[str]:
        """Return how many rows are scored by another answer than the one that is said: where each
        has one, an evaluation does not look whether there is none."""
        if not (self.have_answers and self.of_none):
            return []
        return [
            f"{spell_count(self.of_none, 'row is', 'rows are')} said to have no answer; as all "
            "that say what "
            "is right have "
            "one, the metrics are of the likeliest answers"
        ]


NO_ANSWERS = list(b"[]")


def _limit_stride(recipe: Recipe) -> Recipe:
    """Let windows share half of them at most: they may be shorter here than in training."""
    stride = min(recipe.data.stride, recipe.training.max_length // 2)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"stride": stride})})


def _list_columns(columns: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in columns.items()}
