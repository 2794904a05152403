"""Encode pairs of answers, of which one is preferred: two conversations in one row.

A row's `input_ids` and `labels` are those of the chosen conversation and then of the rejected one;
`documents` holds the length of each. So a pair is one row for all that counts, deals and packs
rows, and is never in two pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError
from lora_cli.data import formats
from lora_cli.data.encode import Batch, Encoded, Made, Renderer
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept

DOCUMENTS = "documents"
"""The column with the lengths of a row's two conversations."""
SAME = "dropped: chosen and rejected are the same"


class PreferenceEncoder(Renderer):
    """Encodes rows with two answers each; `recipe` is settled."""

    row_formats: ClassVar[formats.Formats] = {"preference": formats.ANSWERS}
    column_sets: ClassVar[formats.ColumnSets] = (
        {"chosen": "chosen_response", "rejected": "rejected_response", "prompt": "prompt"},
        {"chosen": "chosen_response", "rejected": "rejected_response", "prompt": "instruction"},
        {"chosen": "response_chosen", "rejected": "response_rejected", "prompt": "prompt"},
    )
    columns: Mapping[str, Any] = MappingProxyType(
        {"input_ids": np.int32, "labels": np.int32, DOCUMENTS: np.int32}
    )

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, day: date | None = None
    ) -> None:
        super().__init__(tokenizer, recipe.data.train_on, day)
        self.longest = recipe.training.max_length
        self.refuses_long = recipe.data.on_long_row == "error"

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a prompt and two answers among columns of other names."""
        prompt, chosen, rejected = [*columns, "COLUMN", "COLUMN"][:3]
        return formats.suggest_columns(prompt=prompt, chosen=chosen, rejected=rejected)

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return the text of the chosen conversation in parts, and then the rejected one's; see
        `split_pair`."""
        return [part for one in self.split_pair(row) for part in one]

    def split_pair(self, row: Kept) -> Iterator[list[tuple[bool, str]]]:
        """Yield of each of a row's conversations its parts, each with whether it carries loss."""
        cut = int(row.read(DOCUMENTS)[0])
        for part in (slice(None, cut), slice(cut, None)):
            one = row._replace(input_ids=row.input_ids[part], labels=row.labels[part])
            yield super().split_by_loss(one)

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of pairs with what each became, or why it has none."""
        waiting = list[Batch]()

        def walk_conversations() -> Iterator[Batch]:
            for batch in batches:
                waiting.append(batch)
                yield [(place, one) for place, pair in batch for one in pair]

        for _, made in super().encode(walk_conversations()):
            batch = waiting.pop(0)
            both = zip(batch, made[::2], made[1::2])
            yield batch, [self._join(place, *found) for (place, _), *found in both]

    def _join(
        self, place: str, chosen: list[Encoded] | BadRow, rejected: list[Encoded] | BadRow
    ) -> list[Encoded] | BadRow:
        """Return two encoded conversations as one row."""
        for found in (chosen, rejected):
            if isinstance(found, BadRow):
                return found
            if len(found) != 1:
                return BadRow("the chat template changes earlier turns of a row with two answers")
        one, other = chosen[0], rejected[0]  # type: ignore[index]  # neither is a BadRow
        lengths = [len(one.input_ids), len(other.input_ids)]
        joined = Encoded(
            np.concatenate([one.input_ids, other.input_ids]),
            np.concatenate([one.labels, other.labels]),
            one.control_in_text or other.control_in_text,
            one.begins_inside or other.begins_inside,
            tuple(sorted({*one.unread, *other.unread})),
            {DOCUMENTS: np.array(lengths, np.int32)},
            dropped=self._find_useless(place, one, other),
        )
        return [joined]

    def _find_useless(self, place: str, one: Encoded, other: Encoded) -> str:
        """Return why a pair teaches nothing, or cannot be kept; empty where it does not."""
        longest = max(len(one.input_ids), len(other.input_ids))
        if not all((each.labels[1:] != IGNORED).any() for each in (one, other)):
            return "dropped: an answer without loss"
        if np.array_equal(one.input_ids, other.input_ids):
            return SAME
        if longest <= self.longest:
            return ""
        if self.refuses_long:
            raise LoraError(
                f"{place}: an answer with its prompt has {longest} tokens, over "
                f"training.max_length {self.longest}",
                f"--set training.max_length={longest}, or --set data.on_long_row=drop",
            )
        return f"dropped: an answer over {self.longest} tokens"


def take_chosen(row: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return the ids and labels of a row's chosen conversation, or of its only one."""
    cut = int(row[DOCUMENTS][0]) if DOCUMENTS in row else len(row["input_ids"])
    return {name: row[name][:cut] for name in ("input_ids", "labels")}


def are_pairs(lengths: NDArray, documents: NDArray) -> bool:
    """Return whether these may be the lengths of the conversations of rows of these lengths, all
    rows one after another."""
    both = documents.reshape(-1, 2) if len(documents) == 2 * len(lengths) else None
    return both is not None and bool((both > 1).all() and (both.sum(axis=1) == lengths).all())
