"""Tell what the words of texts are: the predictor of models that tag words.

A row has words, as rows for training do, or a text. Of a text, words are what its tokenizer splits
it into before it makes tokens of each, or, where that leaves spaces inside of words, what stands
between spaces. A word is what its first token is, as in training.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from lora_cli.common import spell_count
from lora_cli.data import collate, formats, tag
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
from lora_cli.scoring import answers, find_scorer

TEXTS = Layout({"text": ("text",)}, ({"text": "sentence"}, {"text": "content"}))


class Words(NamedTuple):
    """The words of a row that have a token: the place of each word, that of its first token, and
    where the text between two places comes from."""

    spans: list[tuple[int, int]]
    firsts: list[int]
    source: str | list[str]

    def read(self, start: int, end: int) -> str:
        """Return the text from one place to another."""
        found = self.source[start:end]
        return found if isinstance(found, str) else " ".join(found)


class Tokens(NamedTuple):
    """The tokens of a row: columns of numbers, of which word each is, and where in it, or in the
    text."""

    columns: dict[str, Any]
    words: list[int | None]
    offsets: list[tuple[int, int]]


class Tagger:
    """Answers with entities and their places, or with a tag for each word."""

    expected: ClassVar[str] = "tags"
    shown: ClassVar[tuple[str, ...]] = ("tokens", "text")
    layouts: ClassVar[Sequence[Layout]] = (*make_layouts(tag.TagEncoder, expected), TEXTS)

    def __init__(self, model: Opened, reading: Reading) -> None:
        self.model, self.reading = model, reading
        self.encoder = tag.TagEncoder(model.tokenizer, make_recipe(model, reading))
        self.collate = collate.TaskCollator(model.tokenizer, by_token=True, measured=False)
        self.scorer = find_scorer(model.task)(model.labels, model.problem_type)
        self.lost = 0

    @property
    def limit(self) -> int:
        """How many tokens a row may have."""
        return self.encoder.limit

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return the tokens of each row, with the places of its words."""
        found: list[Ready | formats.BadRow | None] = [None] * len(rows)
        for at, asked in enumerate(rows):
            try:
                found[at] = Ready(0, self._convert(asked))
            except formats.BadRow as bad:
                found[at] = bad
        for kind in (str, list):
            good = {
                at: row.content
                for at, row in enumerate(found)
                if isinstance(row, Ready) and isinstance(row.content[0], kind)
            }
            tokens = self._tokenize([source for source, _ in good.values()]) if good else []
            for (at, (source, tags)), given in zip(good.items(), tokens):
                found[at] = self._finish(source, tags, given)
        return [each for each in found if each is not None]

    def _finish(
        self, source: str | list[str], tags: list[int] | None, given: Tokens
    ) -> Ready | formats.BadRow:
        """Return a row ready to be fed, cut where it is too long and that is no error."""
        if is_cut := self.reading.cuts and len(given.columns["input_ids"]) > self.limit:
            [given] = self._tokenize([source], truncation=True, max_length=self.limit)
        length = len(given.columns["input_ids"])
        try:
            refuse_length(length, self.limit)
        except formats.BadRow as bad:
            return bad
        words = find_words(given, source)
        if isinstance(source, list) and not is_cut:
            self.lost += len(source) - len(words.firsts)
        labels = [IGNORED] * length
        if tags is not None:
            for (word, _), first in zip(words.spans, words.firsts):
                labels[first] = tags[word]
        return Ready(length, (given.columns | {"labels": labels}, words), is_cut)

    def _tokenize(self, sources: Sequence[str | list[str]], **cut: Any) -> list[Tokens]:
        """Return the tokens of texts, or of lists of words: all of one kind."""
        given = self.model.tokenizer(
            sources,
            is_split_into_words=isinstance(sources[0], list),
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
            **cut,
        )
        names = [name for name in collate.INTEGERS if name in given]
        return [
            Tokens(
                {name: given[name][at] for name in names},
                given.word_ids(at),
                given["offset_mapping"][at],
            )
            for at in range(len(sources))
        ]

    def _convert(self, asked: Asked) -> tuple[str | list[str], list[int] | None]:
        """Return a row's text, or its words, and the numbers of its tags where they are told."""
        if asked.style == "text":
            return formats.get_filled_text(asked.row, "text"), None
        tags = asked.row.get(self.expected)
        if not (is_told(tags) and self.reading.with_labels):
            return tag.read_words(asked.row), None
        row = tag.convert_tagged(asked.row)
        numbers = [self.encoder.find_number(each) for each in row.tags]
        tag.refuse_odd_tags([self.model.labels[number] for number in numbers])
        return row.words, numbers

    def answer(self, batch: Sequence[Ready]) -> list[answers.Answer | formats.BadRow]:
        """Return the entities of rows, or the tags of their words."""
        given = self.collate([row.content[0] for row in batch])
        labels = given.pop("labels")
        logits = self.model.compute(given)
        bad = find_unfinished(self.model, logits)
        kept = [at for at, each in enumerate(bad) if each is None]
        self.scorer.add(logits[kept], labels[kept], {})
        said = [
            answers.answer_tags(
                logits[at, words.firsts].numpy(),
                self.model.labels,
                words.spans,
                words.read,
                self.reading.everything,
            )
            for at, words in enumerate(row.content[1] for row in batch)
        ]
        return [each or answer for each, answer in zip(bad, said)]

    def list_notes(self) -> list[str]:
        """Return how many words could be told nothing of."""
        return (
            [f"{spell_count(self.lost, 'word has', 'words have')} no tokens, and so no tag"]
            if self.lost
            else []
        )


def find_words(given: Tokens, source: str | list[str]) -> Words:
    """Return the words of a text, or of a list of words, that have tokens."""
    numbers = given.words
    if isinstance(source, list):
        firsts = tag.find_first_tokens(numbers)
        return Words([(word, word + 1) for word in firsts], list(firsts.values()), source)
    spans = _find_spans(source, numbers, given.offsets)
    if any(SPACE.search(source, *span) for span in spans.values()):
        numbers = _number_by_spaces(source, numbers, given.offsets)
        spans = _find_spans(source, numbers, given.offsets)
    firsts = tag.find_first_tokens(numbers)
    return Words(list(spans.values()), [firsts[word] for word in spans], source)


SPACE, WORD = re.compile(r"\s"), re.compile(r"\S+")


def _find_spans(
    text: str, numbers: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """Return where each word begins and ends, by its tokens, without spaces around it, which some
    tokenizers count as a part of it; none for spaces alone."""
    found: dict[int, tuple[int, int]] = {}
    for word, (start, end) in zip(numbers, offsets):
        part = text[start:end]
        if word is not None and part.strip():
            start, end = (
                start + len(part) - len(part.lstrip()),
                end - len(part) + len(part.rstrip()),
            )
            first, last = found.get(word, (start, end))
            found[word] = min(first, start), max(last, end)
    return found


def _number_by_spaces(
    text: str, numbers: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> list[int | None]:
    """Return for each token the number of the word between spaces in which it begins, or before
    which it is a space."""
    starts = [word.start() for word in WORD.finditer(text)]
    return [
        None
        if number is None or (letter := WORD.search(text, start)) is None
        else bisect.bisect_right(starts, letter.start()) - 1
        for number, (start, _) in zip(numbers, offsets)
    ]
