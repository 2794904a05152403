"""What answers the rows of a task by one model: a predictor for each task. The verb asks it without
knowing which it is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from lora_cli.common import provenance, stored
from lora_cli.data import encoders, formats
from lora_cli.evaluate.opened import Opened
from lora_cli.recipe import Recipe, Task
from lora_cli.scoring import Scorer, answers


class Reading(NamedTuple):
    """How rows are read for a model, and how much of it is said."""

    max_length: int | None = None
    """Tokens of a row; None: as in training, and no more than the model reads."""
    cuts: bool = True
    """Whether longer rows are cut, and no error."""
    with_labels: bool = True
    """Whether answers are compared with what rows are known to be."""
    everything: bool = False
    """Whether the probabilities of all labels are said, the tags of all words, and the answers in
    all windows over a text."""
    batch_size: int = 32
    """Rows that are computed at once, or windows of long ones."""
    max_new_tokens: int | None = None
    """Tokens of a text that is written; None: as in training."""


class Asked(NamedTuple):
    """A row to answer, under our names of columns, in one of the formats of its task."""

    style: str
    row: dict[str, Any]
    place: str = ""
    """Where it stands."""


@dataclass
class Ready:
    """A row that is ready to be fed to a model."""

    length: int
    """By which rows are sorted, so that those of a batch are about as long."""
    content: Any
    """The predictor's own."""
    is_cut: bool = False


class Layout(NamedTuple):
    """Formats of rows with the columns that each needs, and other names of these."""

    formats: formats.Formats
    sets: formats.ColumnSets


class Predictor(Protocol):
    """Answers rows by one model."""

    layouts: ClassVar[Sequence[Layout]]
    """What rows may be, the first that fits: first those with answers, then those without."""
    expected: ClassVar[str]
    """The column that says what would be right, where a row has it."""
    shown: ClassVar[tuple[str, ...]]
    """The columns that are repeated beside an answer."""
    scorer: Scorer
    """What knows of all rows of which it is known what is right."""

    def __init__(self, model: Opened, reading: Reading) -> None: ...

    @property
    def limit(self) -> int:
        """How many tokens a row may have."""

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return each row ready to be fed, or why it cannot be."""

    def answer(self, batch: Sequence[Ready]) -> list[answers.Answer | formats.BadRow]:
        """Return what the model says of each row; note it where what is right is known."""

    def list_notes(self) -> list[str]:
        """Return what is to be said of the rows when all are answered."""


def find_predictor(task: Task) -> type[Predictor]:
    """Return the class that answers the rows of a task."""
    module, _, name = task.predictor.partition(".")
    found: type[Predictor] = getattr(importlib.import_module(f"lora_cli.evaluate.{module}"), name)
    return found


def make_layouts(encoder: type[encoders.Encoder], expected: str) -> tuple[Layout, Layout]:
    """Return the rows that a task is trained on, and the same without what is `expected`."""
    without = {
        style: tuple(name for name in needed if name != expected)
        for style, needed in encoder.row_formats.items()
    }
    sets = [
        {ours: theirs for ours, theirs in names.items() if ours != expected}
        for names in encoder.column_sets
    ]
    fresh = [names for at, names in enumerate(sets) if names not in sets[:at]]
    return Layout(encoder.row_formats, encoder.column_sets), Layout(without, fresh)


NO_LIMIT = 2**30
"""Tokens that no row has."""


def make_recipe(model: Opened, reading: Reading, *options: str) -> Recipe:
    """Return the recipe by which an encoder reads rows for a model: its labels, the limit, and
    those `options` of `data` that it was trained with. Raises LoraError where its record has them
    as nothing that they can be."""
    kept = {name: model.recorded[name] for name in options if name in model.recorded}
    told = {"labels": model.labels, "problem_type": model.problem_type}
    cut = next((way for way in ("truncate", "split") if way in model.task.long_rows), "error")
    limit = None if model.task.reads_pictures else model.find_limit(reading.max_length)
    sections: dict[str, Any] = {
        "model": {"name_or_path": model.name, **(told if model.task.counts_labels else {})},
        "data": {"path": "-", "on_long_row": cut if reading.cuts else "error", **kept},
        "training": {"max_length": limit or NO_LIMIT},
    }
    with stored.explain_misfits(Path(model.name, provenance.ARTEFACT_RECORD), "recipe"):
        return Recipe(task=model.task.name, output_dir="-", **sections)  # type: ignore[arg-type]


def refuse_length(length: int, limit: int) -> None:
    """Raise BadRow for a row of more tokens than the limit, where such rows are not cut."""
    if length > limit:
        said = f"{length} tokens, over {limit}"
        raise formats.BadRow("too long", said, "--on-long-row truncate, or --on-bad-row skip")


def find_unfinished(model: Opened, logits: torch.Tensor) -> list[formats.BadRow | None]:
    """Return for each row of logits (rows, …) why it has no answer, where a number of it is not
    finite. Raises LoraError where that is so because a weight is not."""
    finite = logits.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        model.refuse_bad_weights()
    why = formats.BadRow(
        "an answer that is not finite",
        f"the numbers that {model.name} answers with are not finite",
        f"its {model.type_name} may hold none as large: mend the row, or --on-bad-row skip",
    )
    return [None if each else why for each in finite]


def is_told(value: Any) -> bool:
    """Return whether a row says what is right: a table has an empty text where it does not."""
    return value is not None and value != ""
