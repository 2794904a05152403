"""Put rows of a task together to a batch: as long as its longest row, with labels beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.models import IGNORED

INTEGERS = ("input_ids", "token_type_ids")


class TaskCollator:
    """Collates rows for models that tell labels apart.

    A batch has (rows, length) `input_ids` and `attention_mask`, and `labels` of the same shape
    where each token has one (`by_token`), else of (rows, labels of a row): whole numbers, or float
    where `measured`. A row without any label (that of a process that has none) gets -100 or NaN.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        by_token: bool,
        measured: bool,
        multiple: int | None = None,
    ) -> None:
        self.tokenizer, self.by_token, self.measured = tokenizer, by_token, measured
        self.multiple = multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in INTEGERS if all(name in row for row in rows)]
        given = [{name: list(row[name]) for name in names} for row in rows]
        batch = dict(
            self.tokenizer.pad(
                given, padding=True, return_tensors="pt", pad_to_multiple_of=self.multiple
            )
        )
        length = batch["input_ids"].shape[1]
        width = length if self.by_token else max(len(row["labels"]) for row in rows)
        batch["labels"] = torch.stack([self._pad_labels(row["labels"], width) for row in rows])
        return batch

    def _pad_labels(self, labels: Sequence[float], width: int) -> torch.Tensor:
        """Return a row's labels, those of its padding ignored."""
        if self.measured:
            found = torch.tensor(labels, dtype=torch.float32)
            return torch.full((width,), torch.nan) if (found == IGNORED).all() else found
        found = torch.tensor(labels, dtype=torch.long)
        if not self.by_token:
            return found[:width] if (found != IGNORED).any() else found.new_full((width,), IGNORED)
        padding = found.new_full((width - len(found),), IGNORED)
        left = self.tokenizer.padding_side == "left"
        return torch.cat([padding, found] if left else [found, padding])
