"""Encode words with a tag each: the first token of a word has the word's label, others none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, spell_count
from lora_cli.data import formats
from lora_cli.data.classify import LabelEncoder
from lora_cli.data.encode import Batch, Encoded, Made, refuse_half_characters
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept


class Tagged(NamedTuple):
    """The words of a text, and the tag of each."""

    words: list[str]
    tags: list[Any]


class TagEncoder(LabelEncoder):
    """Encodes rows for models that tag words; `recipe` is settled."""

    row_formats: ClassVar[formats.Formats] = {"tagged": ("tokens", "tags")}
    column_sets: ClassVar[formats.ColumnSets] = (
        {"tokens": "tokens", "tags": "ner_tags"},
        {"tokens": "tokens", "tags": "labels"},
        {"tokens": "tokens", "tags": "ner"},
        {"tokens": "tokens", "tags": "pos_tags"},
        {"tokens": "words", "tags": "tags"},
        {"tokens": "words", "tags": "ner_tags"},
        {"tokens": "words", "tags": "labels"},
        {"tokens": "words", "tags": "ner"},
    )
    by_token: ClassVar[bool] = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        super().__init__(tokenizer, recipe, day)
        refuse_glued_words(tokenizer)

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names words and tags among columns of other names."""
        return formats.suggest_columns(tokens=columns[0], tags=columns[-1])

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` a Tagged."""
        return convert_tagged

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows, all rows one after another."""
        known = (labels == IGNORED) | ((labels >= 0) & (labels < len(self.names)))
        return len(ids) == len(labels) and bool(known.all())

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the row's text in parts, after the first token of each word its tag."""
        parts = list[tuple[bool, str]]()
        tokens = self.tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
        for token, label in zip(tokens, row.labels.tolist()):
            parts.append((False, f" {token}"))
            if label != IGNORED and self.names[label] != "O":
                parts.append((True, f"/{self.names[label]}"))
        return parts

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""
        for batch in batches:
            rows = [row for _, row in batch]
            given = split_words(self.tokenizer, [row.words for row in rows])
            made: Made = []
            for number, row in enumerate(rows):
                try:
                    made.append([self._label(row, given, number)])
                except BadRow as bad:
                    made.append(bad)
            yield batch, made

    def _label(self, row: Tagged, given: Any, number: int) -> Encoded:
        """Return a row's tokens, the first of each word with the word's tag."""
        numbers = [self.find_number(tag) for tag in row.tags]
        refuse_odd_tags([self.names[each] for each in numbers])
        ids = np.array(given["input_ids"][number], np.int32)
        firsts = find_first_tokens(given.word_ids(number))
        if len(firsts) < len(row.words):
            lost = next(at for at in range(len(row.words)) if at not in firsts)
            raise BadRow(
                "a word has no tokens",
                f"word {lost + 1} ({row.words[lost]!r}) has no tokens, so that its tag is lost",
                "take it out of the row, with its tag",
            )
        labels = np.full(len(ids), IGNORED, np.int32)
        labels[list(firsts.values())] = [numbers[word] for word in firsts]
        others = {}
        if self.has_parts:
            others["token_type_ids"] = np.array(given["token_type_ids"][number], np.int32)
        uncut = 0
        if self.cuts and len(ids) > self.limit:
            uncut = len(ids)
            ids, labels, others = self._cut(ids, labels, others)
        return Encoded(ids, labels, False, others=others, uncut=uncut)

    def _cut(
        self, ids: NDArray, labels: NDArray, others: dict[str, NDArray]
    ) -> tuple[NDArray, NDArray, dict[str, NDArray]]:
        """Return a row cut to the limit, with the special tokens at its end kept."""
        special = self.tokenizer.get_special_tokens_mask(
            ids.tolist(), already_has_special_tokens=True
        )
        end = next((at for at, mark in enumerate(reversed(special)) if not mark), 0)
        kept = np.r_[0 : self.limit - end, len(ids) - end : len(ids)]
        return ids[kept], labels[kept], {name: given[kept] for name, given in others.items()}


def convert_tagged(row: Mapping[str, Any]) -> Tagged:
    """Return a row's words and tags; raise BadRow unless there is one tag for each word."""
    words, tags = read_words(row), formats.get_list(row, "tags")
    if len(words) != len(tags):
        raise BadRow(
            "there is not one tag for each word",
            f"there are {spell_count(len(words), 'word')} and {spell_count(len(tags), 'tag')}",
        )
    return Tagged(words, tags)


def read_words(row: Mapping[str, Any]) -> list[str]:
    """Return a row's words; raise BadRow unless they are a list of texts."""
    words = formats.get_list(row, "tokens")
    for word in words:
        if not isinstance(word, str):
            raise BadRow("a word is no text", f"the word {str(word)[:40]} is no text")
        refuse_half_characters(word)
    return words


def split_words(tokenizer: PreTrainedTokenizerBase, rows: list[list[str]]) -> Any:
    """Return the tokens of rows of words; `word_ids(number)` says of which word each is."""
    return tokenizer(rows, is_split_into_words=True, return_attention_mask=False, verbose=False)


def find_first_tokens(words: Iterable[int | None]) -> dict[int, int]:
    """Return where the first token of each word stands, by the word's number."""
    found: dict[int, int] = {}
    for place, word in enumerate(words):
        if word is not None:
            found.setdefault(word, place)
    return found


def refuse_odd_tags(tags: list[str]) -> None:
    """Raise BadRow for a tag that goes on with an entity which has not begun (IOB2)."""
    for number, (before, tag) in enumerate(pairwise(["O", *tags]), 1):
        kind = tag[2:]
        if tag.startswith("I-") and before not in (f"B-{kind}", f"I-{kind}"):
            raise BadRow(
                "an entity goes on that has not begun",
                f"word {number} has {tag} after {before}: an entity begins with B-{kind}",
                f"write B-{kind} there (IOB2), or --set data.on_bad_row=skip",
            )


def refuse_glued_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise LoraError for a tokenizer that splits words otherwise alone than in a running text: of
    bytes, and without a space before the first one."""
    words = ["Angela", "Merkel", "visited", "Paris"]
    alone = tokenizer([words], is_split_into_words=True, add_special_tokens=False)["input_ids"][0]
    running = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    after_space = tokenizer(" " + " ".join(words), add_special_tokens=False)["input_ids"]
    if alone not in (running, after_space):
        raise LoraError(
            "model.name_or_path: the tokenizer glues words together that are given one by one, so "
            "that other tokens are trained than a running text has",
            "set add_prefix_space to true in a copy of its tokenizer_config.json",
        )
