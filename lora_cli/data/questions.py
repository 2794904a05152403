"""Encode questions with the text that is to have their answers: labels are the places where an
answer begins and ends.

A text that is too long is read in windows, which overlap. A window without the whole answer says
that there is none: its labels are both the row's first token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.common import UsageError, spell_count
from lora_cli.data import formats
from lora_cli.data.asked import Answer, Asked, convert_asked
from lora_cli.data.encode import Batch, Encoded, Made
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED
from lora_cli.recipe import Data, Recipe

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept

NONE = "without an answer"
ROOM = 16
"""Tokens of a long text that a window has at least."""
BLANKS = [number for number in range(0x3001) if chr(number).isspace()]


class Tokens(NamedTuple):
    """A question with its text as tokens: where each begins and ends in the text, in characters and
    without the blanks around it; -1 for those that are not the text's."""

    ids: NDArray
    starts: NDArray
    ends: NDArray
    first: int
    """The text's first token."""
    stop: int
    """The token after its last one."""
    written: NDArray
    """The tokens of both texts, without those that are put around them."""
    parts: NDArray
    """Which text each is of, as models with segments are told."""


class QuestionEncoder:
    """Encodes rows for models that answer questions out of a text; `recipe` is settled.

    Rows have `token_type_ids` where the tokenizer makes them, which for an adapter it does not:
    PEFT's class for this task does not hand them on to the model.
    """

    row_formats: ClassVar[formats.Formats] = {"squad": ("question", "context", "answers")}
    column_sets: ClassVar[formats.ColumnSets] = (
        {"question": "query", "context": "context", "answers": "answers"},
        {"question": "question", "context": "passage", "answers": "answers"},
        {"question": "question", "context": "text", "answers": "answers"},
        {"question": "question", "context": "document", "answers": "answers"},
        {"question": "question", "context": "context", "answers": "answer"},
    )
    by_token: ClassVar[bool] = False
    marked: ClassVar[str] = "its answer"
    beside: ClassVar[tuple[str, ...]] = ("question", "starts", "ends", "context", "answers")
    names: Sequence[str] = ()

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.day = day or date.today()
        self.limit = recipe.training.max_length
        self.stride = recipe.data.stride
        usual = Data.model_fields["stride"].default
        if self.limit // 2 < self.stride != usual:
            raise UsageError(
                f"{recipe.where('data', 'stride')}: windows of up to {self.limit} tokens share "
                "half of them at most",
                f"--set data.stride={self.limit // 2}, or less",
            )
        self.longest = recipe.data.longest_answer
        self.in_windows = recipe.data.on_long_row == "split"
        self.control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self.has_parts = "token_type_ids" in tokenizer.model_input_names

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a row, and the type of their numbers.

        `question` is the row's number. `starts` and `ends` are those of `Tokens`; `context` is the
        window's text in UTF-8, `answers` are the right ones as a JSON list.
        """
        parts = {"token_type_ids": np.int32} if self.has_parts else {}
        numbers = dict.fromkeys(("input_ids", "labels", "question", "starts", "ends"), np.int32)
        return {**numbers, "context": np.uint8, "answers": np.uint8, **parts}

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names question, text and answers among columns of other names."""
        named = dict(zip(("question", "context", "answers"), columns))
        return formats.suggest_columns(**named)

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` an Asked."""
        return convert_asked

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows of such lengths, one after another."""
        if len(labels) != 2 * len(lengths):
            return False
        first, last = labels.reshape(-1, 2).T
        return bool(((first >= 0) & (first <= last) & (last < lengths)).all())

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the row's text in parts, of which the answer is to be found."""
        first, last = row.labels.tolist()
        ids = row.input_ids.tolist()
        parts = [(False, ids[:first]), (True, ids[first : last + 1]), (False, ids[last + 1 :])]
        decode = self.tokenizer.decode
        return [(mark, decode(part, skip_special_tokens=False)) for mark, part in parts if part]

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with the windows that each became, or why it has none."""
        number = 0
        for batch in batches:
            rows = [row for _, row in batch]
            made: Made = []
            for row, encoding in zip(rows, self._tokenize(rows)):
                try:
                    made.append(self._encode(row, read_tokens(row, encoding), number))
                except BadRow as bad:
                    made.append(bad)
                number += 1
            yield batch, made

    def _tokenize(self, rows: Sequence[Asked]) -> Any:
        pairs = [row.question for row in rows], [row.context for row in rows]
        return self.tokenizer(*pairs, return_offsets_mapping=True, verbose=False).encodings

    def _encode(self, row: Asked, tokens: Tokens, number: int) -> list[Encoded]:
        """Return the windows of a row, or the whole of it where long ones are not cut."""
        spans = [find_span(answer, tokens) for answer in row.answers]
        others = tokens.first + len(tokens.ids) - tokens.stop
        windows = [(tokens.first, tokens.stop)]
        if self.in_windows:
            windows = list(cut_windows(*windows[0], self._find_room(others, tokens), self.stride))
        accepted = np.frombuffer(json.dumps([each.text for each in row.answers]).encode(), np.uint8)
        beside: dict[str, NDArray] = {"question": np.array([number], np.int32), "answers": accepted}
        made = [self._cut(row, tokens, window, spans, beside) for window in windows]
        held = [at for at, span in enumerate(spans) if _is_held(span, windows)]
        if spans and not held:
            none = np.full(2, IGNORED, np.int32)
            reason = f"dropped: with an answer longer than a window of {self.limit} tokens"
            return [Encoded(tokens.ids, none, False, dropped=reason)]
        notes = [f"read in windows of {self.limit} tokens"] if len(windows) > 1 else []
        notes += self._list_notes(row.answers[held[0]], tokens, spans[held[0]]) if held else [NONE]
        control = not self.control.isdisjoint(tokens.written.tolist())
        return [made[0]._replace(notes=notes, control_in_text=control), *made[1:]]

    def _find_room(self, others: int, tokens: Tokens) -> int:
        """Return how many of the text's tokens fit beside the question; BadRow where too few do."""
        room = self.limit - others
        if room < min(ROOM, tokens.stop - tokens.first):
            raise BadRow(
                "a question leaves no room for its text",
                f"the question has {spell_count(others, 'token')} with those around it, which "
                "leaves room for "
                f"{max(room, 0)} of its text within {self.limit} tokens",
                f"--set training.max_length={others + ROOM}, or more",
            )
        return room

    def _cut(
        self,
        row: Asked,
        tokens: Tokens,
        window: tuple[int, int],
        spans: Sequence[tuple[int, int]],
        beside: Mapping[str, NDArray],
    ) -> Encoded:
        """Return a window with the places of the first of the answers that it has whole."""
        begin, stop = window
        kept = np.r_[0 : tokens.first, begin:stop, tokens.stop : len(tokens.ids)]
        starts, ends = tokens.starts[kept], tokens.ends[kept]
        inside = [span for span in spans if begin <= span[0] and span[1] < stop]
        moved = begin - tokens.first
        places = [place - moved for place in inside[0]] if inside else [0, 0]
        text = row.context[tokens.starts[begin:stop].min() : tokens.ends[begin:stop].max()]
        own = {"starts": starts, "ends": ends, "context": np.frombuffer(text.encode(), np.uint8)}
        if self.has_parts:
            own["token_type_ids"] = tokens.parts[kept]
        labels = np.array(places, np.int32)
        return Encoded(tokens.ids[kept], labels, False, others={**beside, **own})

    def _list_notes(self, answer: Answer, tokens: Tokens, span: tuple[int, int]) -> list[str]:
        """Return what is to be counted of a row's first answer."""
        first, last = span
        notes = []
        start, end = answer.span
        if tokens.starts[first] < start or tokens.ends[last] > end:
            notes.append("with an answer widened to whole tokens")
        if last - first >= self.longest:
            notes.append(
                f"with an answer of over {self.longest} tokens, which an evaluation does not look "
                "for (data.longest_answer)"
            )
        return notes


def read_tokens(row: Asked, encoding: Any) -> Tokens:
    """Return the tokens of a question and its text; raise BadRow for a text without any."""
    parts, ids = encoding.sequence_ids, np.array(encoding.ids, np.int32)
    of_text = np.array([part == 1 for part in parts])
    places = np.flatnonzero(of_text)
    if not len(places):
        raise BadRow("the context has no tokens")
    offsets = np.array(encoding.offsets, np.int64)
    starts, ends = trim_offsets(row.context, offsets[:, 0], offsets[:, 1])
    return Tokens(
        ids,
        np.where(of_text, starts, -1).astype(np.int32),
        np.where(of_text, ends, -1).astype(np.int32),
        int(places[0]),
        int(places[-1]) + 1,
        ids[[part is not None for part in parts]],
        np.array(encoding.type_ids, np.int32),
    )


def trim_offsets(text: str, starts: NDArray, ends: NDArray) -> tuple[NDArray, NDArray]:
    """Return the offsets of tokens without the blanks at their ends, which some tokenizers count to
    the word after; of blanks alone, both are their end."""
    signs = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    filled = np.flatnonzero(~np.isin(signs, BLANKS))
    nearest = np.append(filled, len(text))[np.searchsorted(filled, starts)]
    starts = np.minimum(nearest, ends)
    before = np.append(filled, -1)[np.searchsorted(filled, ends) - 1] + 1
    return starts, np.where(starts < ends, np.maximum(before, starts), ends)


def find_span(answer: Answer, tokens: Tokens) -> tuple[int, int]:
    """Return the first and the last token that have a part of an answer; raise BadRow where none
    has."""
    start, end = answer.span
    inside = np.flatnonzero((tokens.ends > start) & (tokens.starts < end))
    if not len(inside):
        raise BadRow("an answer has no tokens", f"the answer {answer.text[:40]!r} has no tokens")
    return int(inside[0]), int(inside[-1])


def cut_windows(begin: int, stop: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield the windows of `room` tokens over a text from `begin` to `stop`; neighbours share
    `stride` tokens, half of a window at most."""
    step = room - min(stride, room // 2)
    while begin + room < stop:
        yield begin, begin + room
        begin += step
    yield begin, stop


def _is_held(span: tuple[int, int], windows: Sequence[tuple[int, int]]) -> bool:
    """Return whether a window has a span whole."""
    return any(begin <= span[0] and span[1] < stop for begin, stop in windows)
