"""What makes rows of a task ready to train on: one encoder for each task.

An encoder says which formats of rows its task has, and makes a batch of them columns of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from lora_cli.data.encode import Batch, Made
from lora_cli.data.formats import ColumnSets, Converter, Formats
from lora_cli.data.offsets import NDArray


class Encoder(Protocol):
    """Makes rows columns of numbers."""

    row_formats: ClassVar[Formats]
    """The columns that each format of this task's rows needs."""
    column_sets: ClassVar[ColumnSets]
    """Other names under which they are known, as `ours: theirs`."""
    by_token: ClassVar[bool]
    """Whether each token of a row has a label."""
    tokenizer: PreTrainedTokenizerBase
    day: date

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a row, and the type of their numbers."""

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names columns of other names."""

    def find_converter(self, style: str) -> Converter:
        """Return the function that makes a row of format `style` what `encode` takes."""

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""

    def are_labels(self, ids: NDArray, labels: NDArray) -> bool:
        """Return whether these may be the labels of rows with these ids, all rows one after
        another."""
