"""Put rows of a task together to a batch: as long as its longest row, with labels beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli.data import pictures
from lora_cli.models import IGNORED, PictureProcessor

INTEGERS = ("input_ids", "token_type_ids")
BESIDE = "beside"
"""The key under which a batch has what is beside a model's inputs, each padded with -1."""


class TaskCollator:
    """Collates rows for models of a task other than writing, padded on the right.

    A batch has (rows, length) `input_ids` and `attention_mask`, and `labels` of the same shape
    where each token has one (`by_token`), else of (rows, labels of a row): whole numbers, or float
    where `measured`. A row without any label (that of a process that has none) gets -100 or NaN.
    The columns `beside`, where rows have them, are for those who evaluate and no model's.
    """

    def __init__(
        self,
        tokenizer: Any,
        by_token: bool,
        measured: bool,
        multiple: int | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.by_token, self.measured = tokenizer, by_token, measured
        self.multiple, self.beside = multiple, beside

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [name for name in INTEGERS if all(name in row for row in rows)]
        given = [{name: np.asarray(row[name]).tolist() for name in names} for row in rows]
        batch = dict(
            self.tokenizer.pad(
                given,
                padding=True,
                padding_side="right",
                return_tensors="pt",
                pad_to_multiple_of=self.multiple,
            )
        )
        length = batch["input_ids"].shape[1]
        width = length if self.by_token else max(len(row["labels"]) for row in rows)
        batch["labels"] = torch.stack([self._pad_labels(row["labels"], width) for row in rows])
        beside = [name for name in self.beside if any(name in row for row in rows)]
        if beside:
            batch[BESIDE] = {name: pad([row.get(name, ()) for row in rows]) for name in beside}
        return batch

    def _pad_labels(self, labels: Sequence[float], width: int) -> torch.Tensor:
        """Return a row's labels, those of its padding ignored."""
        if self.measured:
            found = torch.as_tensor(labels, dtype=torch.float32)
            return torch.full((width,), torch.nan) if (found == IGNORED).all() else found
        found = torch.as_tensor(labels, dtype=torch.long)
        if not self.by_token:
            return found[:width] if (found != IGNORED).any() else found.new_full((width,), IGNORED)
        return torch.cat([found, found.new_full((width - len(found),), IGNORED)])


class PictureCollator(TaskCollator):
    """Collates rows for models that classify pictures: these are decoded, and made ready by the
    base's image processor.

    A batch has `pixel_values` (rows, channels, height, width) in the base's type, and `labels` as
    `TaskCollator` makes them, `width` to a row. A row without a picture (that of a process that has
    none) gets a blank one.
    """

    def __init__(
        self, processor: PictureProcessor, measured: bool, width: int, dtype: torch.dtype
    ) -> None:
        super().__init__(processor, by_token=False, measured=measured)
        self.processor, self.width, self.dtype = processor, width, dtype

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        shown = [
            pictures.decode(np.asarray(row["image"], np.uint8).tobytes())
            if "image" in row
            else self.processor.blank
            for row in rows
        ]
        batch = self.processor(shown)
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        blank = [IGNORED] * self.width
        labels = [row["labels"] if "image" in row else blank for row in rows]
        batch["labels"] = torch.stack([self._pad_labels(each, self.width) for each in labels])
        return batch


def pad(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return lists of whole numbers as (lists, length of the longest), padded with -1."""
    made = torch.full((len(lists), max(map(len, lists))), -1)
    for row, numbers in zip(made, lists):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    return made


class PairCollator:
    """Collates pairs of a source and a target for a model with an encoder and a decoder.

    A batch has (rows, longest source) `input_ids` and `attention_mask`, and (rows, longest target)
    `labels`, -100 behind each target, with `decoder_input_ids`: what the decoder is fed, made of
    the labels by `shift`. Both are filled at their ends, whatever the tokenizer does: a decoder
    has no mask, and a table of positions counts from the first token.
    """

    def __init__(
        self,
        tokenizer: Any,
        shift: Callable[[torch.Tensor], torch.Tensor],
        multiple: int | None = None,
    ) -> None:
        self.tokenizer, self.shift, self.multiple = tokenizer, shift, multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(
            self.tokenizer.pad(
                [{"input_ids": np.asarray(row["input_ids"]).tolist()} for row in rows],
                padding=True,
                padding_side="right",
                return_tensors="pt",
                pad_to_multiple_of=self.multiple,
            )
        )
        width, multiple = max(len(row["labels"]) for row in rows), self.multiple or 1
        labels = torch.full((len(rows), -(-width // multiple) * multiple), IGNORED)
        for at, row in enumerate(rows):
            labels[at, : len(row["labels"])] = torch.as_tensor(row["labels"])
        batch["labels"] = labels
        batch["decoder_input_ids"] = self.shift(labels)
        return batch
