"""Encode pairs of texts: a source that is read, and the target that is to be written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data import formats
from lora_cli.data.encode import Batch, Encoded, Made, match_control, refuse_half_characters
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray, count_ids
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept


class Pair(NamedTuple):
    """A text that is read, and the one that is to be written."""

    source: str
    target: str


class PairEncoder:
    """Encodes rows for models with an encoder and a decoder; `recipe` is settled."""

    row_formats: ClassVar[formats.Formats] = {
        "alpaca": ("instruction", "output"),
        "pairs": ("source", "target"),
    }
    column_sets: ClassVar[formats.ColumnSets] = (
        {"instruction": "instruction", "input": "context", "output": "response"},
        {"instruction": "instruction", "output": "response"},
        {"source": "document", "target": "summary"},
        {"source": "article", "target": "highlights"},  # CNN/DailyMail
        {"source": "article", "target": "summary"},
        {"source": "dialogue", "target": "summary"},  # SAMSum
        {"source": "text", "target": "summary"},
        {"source": "text", "target": "target"},
        {"source": "prompt", "target": "completion"},
        {"source": "prompt", "target": "response"},
        {"source": "question", "target": "answer"},
        {"source": "query", "target": "response"},
        {"source": "inputs", "target": "targets"},  # FLAN
        {"source": "input_text", "target": "target_text"},
        {"source": "input", "target": "output"},
        {"source": "translation.*", "target": "translation.*"},
    )
    by_token: ClassVar[bool] = False
    marked: ClassVar[str] = "{} with loss,"
    beside: ClassVar[tuple[str, ...]] = ()
    names: Sequence[str] = ()
    columns: Mapping[str, Any] = MappingProxyType({"input_ids": np.int32, "labels": np.int32})

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.day = day or date.today()
        self.prefix = recipe.data.source_prefix or ""
        self.longest_source = recipe.training.max_length
        self.longest_target = recipe.max_target_length
        self.cuts = recipe.data.on_long_row == "truncate"
        self.control = match_control(tokenizer)

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a source and a target among columns of other names."""
        nested = [name for name in columns if "." in name]
        first, *others = nested if len(nested) > 1 else columns
        return formats.suggest_columns(source=first, target=others[-1] if others else "COLUMN")

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the row's source, and its target, which is learnt."""
        source, target = (
            self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            for ids in (row.input_ids, row.labels)
        )
        return [(False, source), (True, target)]

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` a Pair."""
        return convert_alpaca if style == "alpaca" else convert_pair

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows, all rows one after another."""
        return bool(((labels >= 0) & (labels < count_ids(self.tokenizer))).all())

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with the ids of their sources, and as labels those of their
        targets, or why a row has none."""
        for batch in batches:
            yield batch, self._encode_batch([row for _, row in batch])

    def _encode_batch(self, rows: list[Pair]) -> Made:
        made: Made = [[] for _ in rows]
        whole = list[int]()
        for number, row in enumerate(rows):
            try:
                refuse_half_characters(row.source)
                refuse_half_characters(row.target)
                whole.append(number)
            except BadRow as bad:
                made[number] = bad
        texts = [self.prefix + rows[number].source for number in whole]
        sources = self._tokenize(texts, self.longest_source, text=True)
        targets = self._tokenize([rows[number].target for number in whole], self.longest_target)
        for number, source, target in zip(whole, sources, targets):
            control = any(map(self.control.search, rows[number]))
            made[number] = [self._join(source, target, control)]
        return made

    def _join(
        self, source: tuple[NDArray, int], target: tuple[NDArray, int], control: bool
    ) -> Encoded:
        """Return a row of both texts' ids, each with how many it had where it was cut."""
        (ids, uncut), (labels, uncut_labels) = source, target
        cuts = {
            f"sources cut at {self.longest_source} tokens": uncut,
            f"targets cut at {self.longest_target} tokens": uncut_labels,
        }
        return Encoded(
            ids,
            labels,
            control,
            uncut=uncut,
            uncut_labels=uncut_labels,
            notes=[note for note, was_cut in cuts.items() if was_cut],
        )

    def _tokenize(
        self, texts: list[str], longest: int, text: bool = False
    ) -> list[tuple[NDArray, int]]:
        """Return the ids of each text (`text`: of sources, else of targets), cut where it is too
        long and the recipe says so, with how many a cut one had."""
        if not texts:
            return []
        found = [(np.array(ids, np.int32), 0) for ids in self._give_ids(texts, text)]
        long = [at for at, (ids, _) in enumerate(found) if self.cuts and len(ids) > longest]
        if long:
            cut = {"truncation": True, "max_length": longest}
            again = self._give_ids([texts[at] for at in long], text, **cut)
            for at, ids in zip(long, again):
                found[at] = np.array(ids, np.int32), len(found[at][0])
        return found

    def _give_ids(self, texts: list[str], text: bool, **cut: Any) -> list[list[int]]:
        """Return the tokenizer's ids. Some write a target otherwise than a source."""
        given = {"text" if text else "text_target": texts}
        made = self.tokenizer(**given, return_attention_mask=False, verbose=False, **cut)
        ids: list[list[int]] = made["input_ids"]
        return ids


def convert_pair(row: Mapping[str, Any]) -> Pair:
    """Return a row's source and target; raise BadRow where one is no text, or empty."""
    return Pair(read_source(row), formats.get_filled_text(row, "target"))


def read_source(row: Mapping[str, Any]) -> str:
    """Return a row's source, which may be an instruction with the input that it speaks of; raise
    BadRow where it is no text, or empty."""
    if "instruction" not in row:
        return formats.get_filled_text(row, "source")
    source = formats.get_filled_text(row, "instruction")
    if row.get("input"):
        source += "\n\n" + formats.get_text(row, "input")
    return source


def find_pair(row: Mapping[str, Any]) -> Pair | None:
    """Return the source and target of a row, if its columns are known to be such and nothing else;
    raise BadRow where they hold no texts."""
    pairs = {"pairs": PairEncoder.row_formats["pairs"]}
    columns = formats.list_columns([row])
    sets = [names for names in PairEncoder.column_sets if names.keys() == {"source", "target"}]
    names = formats.guess_columns(columns, pairs, sets)
    known = bool(names) or formats.recognise_format(columns, pairs) is not None
    return convert_pair(formats.rename_columns(row, names)) if known else None


def convert_alpaca(row: Mapping[str, Any]) -> Pair:
    """Return an instruction, with the input that it speaks of, and its output."""
    return Pair(read_source(row), formats.get_filled_text(row, "output"))
