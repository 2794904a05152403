"""What makes rows of a task ready to train on: one encoder for each task.

An encoder says which formats of rows its task has, and makes a batch of them columns of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lora_cli.data.encode import Batch, Made
from lora_cli.data.formats import ColumnSets, Converter, Formats
from lora_cli.data.offsets import NDArray
from lora_cli.models import Reader

if TYPE_CHECKING:
    from lora_cli.data.selection import Kept


class Encoder(Protocol):
    """Makes rows columns of numbers."""

    row_formats: ClassVar[Formats]
    """The columns that each format of this task's rows needs."""
    column_sets: ClassVar[ColumnSets]
    """Other names under which they are known, as `ours: theirs`."""
    names: Sequence[str]
    """What a model of the task tells apart."""
    by_token: ClassVar[bool]
    """Whether each token of a row has a label."""
    marked: ClassVar[str]
    """What is marked where a row is shown; {} stands for how many labels it has."""
    beside: ClassVar[tuple[str, ...]]
    """Columns that are for those who evaluate, and not a model's."""
    tokenizer: Reader
    """What reads the model's input."""
    day: date

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a row, and the type of their numbers."""

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names columns of other names."""

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return a row for a reader, in parts, each with whether it is what is learnt."""

    def find_converter(self, style: str) -> Converter:
        """Return the function that makes a row of format `style` what `encode` takes."""

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""

    def are_labels(self, ids: NDArray, labels: NDArray, lengths: NDArray) -> bool:
        """Return whether these may be the labels of rows with these ids, all rows one after
        another; `lengths` are the rows' numbers of tokens."""
