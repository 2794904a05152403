"""Encode texts, or pairs of texts, with what they are told apart by: labels or numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.common import find_nearest, spell_count
from lora_cli.data import formats
from lora_cli.data.encode import Batch, Encoded, Made, refuse_half_characters
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept

SEVERAL = "multi_label_classification"
NUMBERS = "regression"
MANY = 8
"""How many labels a message lists."""
UNTOLD: Any = object()
"""What stands for the label of a row of which it is not known."""


class Labelled(NamedTuple):
    """A text, or a pair of texts, and what the row says of it."""

    text: str
    pair: str | None
    label: Any


class LabelEncoder:
    """Encodes rows for models that classify texts; `recipe` is settled."""

    row_formats: ClassVar[formats.Formats] = {"labelled": ("text", "label")}
    column_sets: ClassVar[formats.ColumnSets] = (
        {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        {"text": "question1", "text_pair": "question2", "label": "label"},
        {"text": "question1", "text_pair": "question2", "label": "is_duplicate"},
        {"text": "question", "text_pair": "sentence", "label": "label"},
        {"text": "sentence", "label": "label"},
        {"text": "text", "label": "labels"},
        {"text": "text", "label": "category"},
        {"text": "text", "label": "class"},
        {"text": "text", "label": "target"},
        {"text": "text", "label": "sentiment"},
        {"text": "review", "label": "sentiment"},
        {"text": "content", "label": "label"},
        {"text": "question", "label": "label"},
        {"text": "utterance", "label": "intent"},
    )
    by_token: ClassVar[bool] = False
    marked: ClassVar[str] = "its labels"
    beside: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.day = day or date.today()
        self.limit = recipe.training.max_length
        self.cuts = recipe.data.on_long_row == "truncate"
        self.problem = recipe.model.problem_type
        labels = recipe.model.labels
        self.names: Sequence[str] = [] if labels == "auto" else labels
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.has_parts = "token_type_ids" in tokenizer.model_input_names

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a row, and the type of their numbers."""
        parts = {"token_type_ids": np.int32} if self.has_parts else {}
        kind = np.float32 if self.problem == NUMBERS else np.int32
        return {"input_ids": np.int32, "labels": kind, **parts}

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a text and a label among columns of other names."""
        if len(columns) == 1:
            return "add a column with the labels"
        return formats.suggest_columns(text=columns[0], label=columns[-1])

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` a Labelled."""
        return convert_labelled

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows, all rows one after another."""
        if self.problem == NUMBERS:
            return bool(np.isfinite(labels).all())
        most = 2 if self.problem == SEVERAL else len(self.names)
        return bool(((labels >= 0) & (labels < most)).all())

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the row's text, and after it what is learnt of it."""
        text = self.tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False)
        return [(False, f"{text} "), (True, self.name_labels(row.labels))]

    def name_labels(self, labels: NDArray) -> str:
        """Return a row's labels in words."""
        if self.problem == NUMBERS:
            return ", ".join(f"{value:g}" for value in labels.tolist())
        if self.problem == SEVERAL:
            return ", ".join(self.names[at] for at in np.flatnonzero(labels).tolist()) or "none"
        return self.names[int(labels[0])]

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""
        for batch in batches:
            yield batch, self._encode_batch([row for _, row in batch])

    def _encode_batch(self, rows: list[Labelled]) -> Made:
        made: Made = []
        whole = self._tokenize(rows)
        for number, row in enumerate(rows):
            try:
                labels = self.find_labels(row.label)
                made.append([self._finish(row, whole[number], labels)])
            except BadRow as bad:
                made.append(bad)
        return made

    def _tokenize(self, rows: list[Labelled], **cut: Any) -> list[Mapping[str, list[int]]]:
        """Return the tokens of texts, each alone or with its pair."""
        found: list[Mapping[str, list[int]]] = [{} for _ in rows]
        for paired in (False, True):
            places = [at for at, row in enumerate(rows) if (row.pair is not None) is paired]
            if not places:
                continue
            texts = [[rows[at].text for at in places]]
            if paired:
                texts.append([rows[at].pair or "" for at in places])
            given = self.tokenizer(*texts, return_attention_mask=False, verbose=False, **cut)
            for at, place in enumerate(places):
                found[place] = {name: given[name][at] for name in given}
        return found

    def _finish(self, row: Labelled, tokens: Mapping[str, list[int]], labels: NDArray) -> Encoded:
        """Return a row, cut where it is too long and the recipe says so."""
        uncut = 0
        if self.cuts and len(tokens["input_ids"]) > self.limit:
            uncut = len(tokens["input_ids"])
            [tokens] = self._tokenize([row], truncation=True, max_length=self.limit)
        ids = np.array(tokens["input_ids"], np.int32)
        if not len(ids):
            raise BadRow("the text has no tokens")
        if ids[-1] == self.tokenizer.pad_token_id:
            raise BadRow(
                "the text ends with the token that fills short rows",
                f"the text ends with {self.tokenizer.pad_token!r}, which fills short rows: the "
                "model would look at another token",
                "--set training.pad_token=TOKEN, one that no text ends with",
            )
        others = {}
        if self.has_parts:
            others["token_type_ids"] = np.array(tokens["token_type_ids"], np.int32)
        return Encoded(ids, labels, False, others=others, uncut=uncut)

    def find_labels(self, label: Any) -> NDArray:
        """Return a row's label as numbers: of one class, a 0 or 1 for each, or measured values.

        Raise BadRow for a label that is none of the model's. UNTOLD has no loss.
        """
        if label is UNTOLD:
            wide = self.problem in (SEVERAL, NUMBERS)
            return np.full(len(self.names) if wide else 1, IGNORED, self.columns["labels"])
        if self.problem == NUMBERS:
            return read_numbers(label, len(self.names))
        if self.problem == SEVERAL:
            found = np.zeros(len(self.names), np.int32)
            for each in read_several(label):
                found[self.find_number(each)] = 1
            return found
        return np.array([self.find_number(label)], np.int32)

    def find_number(self, label: Any) -> int:
        """Return the number of a label, given by name or, where no name is a number, by that."""
        name = name_label(label)
        if name in self.numbers:
            return self.numbers[name]
        by_place = type(label) is int and not any(each.isdigit() for each in self.names)
        if by_place and 0 <= label < len(self.names):
            return label
        guess = find_nearest(name, self.names)
        more = f" and {len(self.names) - MANY} more" if len(self.names) > MANY else ""
        listed = f"the labels are {', '.join(self.names[:MANY])}{more}"
        raise BadRow(
            f"the label {name!r} is not known",
            f"the label {name!r} is not known; {listed}",
            f"did you mean {guess}?" if guess else "add it to model.labels, or mend the row",
        )


def convert_labelled(row: Mapping[str, Any]) -> Labelled:
    """Return a row's text, or its two texts, with its label."""
    return convert_unlabelled(row)._replace(label=formats.get_value(row, "label"))


def convert_unlabelled(row: Mapping[str, Any]) -> Labelled:
    """Return a row's text, or its two texts, without a label."""
    pair = formats.get_filled_text(row, "text_pair") if "text_pair" in row else None
    text = formats.get_filled_text(row, "text")
    refuse_half_characters(text + (pair or ""))
    return Labelled(text, pair, UNTOLD)


def name_label(label: Any) -> str:
    """Return a label's name; raise BadRow for a value that names none."""
    if isinstance(label, str) and label.strip():
        refuse_half_characters(label)
        return label.strip()
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    shown = f" ({str(label)[:40]})" if label not in (None, "") else ""
    raise BadRow("the label names no class", f"the label names no class{shown}")


def read_several(label: Any) -> list[Any]:
    """Return the labels of a row that may have several, or none; raise BadRow for no list."""
    if isinstance(label, str):  # a table has no lists
        return [part for part in label.replace(";", ",").split(",") if part.strip()]
    if not isinstance(label, list):
        raise BadRow("the labels are no list", f"the labels are {str(label)[:40]}, not a list")
    return label


def read_numbers(label: Any, count: int) -> NDArray:
    """Return the measured values of a row; raise BadRow unless they are `count` finite numbers."""
    values = label if isinstance(label, list) else [label]
    found = [read_number(value) for value in values]
    if count and len(found) != count:
        raise BadRow(
            "other numbers of values",
            f"it has {spell_count(len(found), 'value')}, and others {count}",
        )
    return np.array(found, np.float32)


def read_number(value: Any) -> float:
    """Return a number that may be written as text; raise BadRow for anything else."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("the label is no number", f"the label is {str(value)[:40]!r}, and no number")
    return number
