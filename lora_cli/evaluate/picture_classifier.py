"""Tell what labels pictures have: the predictor of models that classify them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lora_cli.data import classify, classify_pictures, collate, formats
from lora_cli.evaluate.classifier import Classifier
from lora_cli.evaluate.opened import Opened
from lora_cli.evaluate.predictors import (
    NO_LIMIT,
    Asked,
    Layout,
    Reading,
    Ready,
    is_told,
    make_layouts,
    make_recipe,
)
from lora_cli.scoring import find_scorer, losses


class PictureClassifier(Classifier):
    """Answers with labels and their probabilities, or with measured values. A row is known by its
    place, which is its file or its line: the picture itself is not repeated."""

    shown: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[Sequence[Layout]] = make_layouts(classify_pictures.PictureEncoder, "label")

    def __init__(self, model: Opened, reading: Reading) -> None:
        self.model, self.reading = model, reading
        self.problem = model.problem_type
        self.pictures = classify_pictures.PictureEncoder(model.reader, make_recipe(model, reading))
        measured = losses.is_measured(self.problem)
        width = len(model.labels) if measured else 1
        self.collate = collate.PictureCollator(model.reader, measured, width, model.network.dtype)
        self.scorer = find_scorer(model.task)(model.labels, self.problem)

    @property
    def limit(self) -> int:
        """How many tokens a row may have: a picture has none."""
        return NO_LIMIT

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return each picture, with its label where it is told."""
        return [self._prepare(row) for row in rows]

    def _prepare(self, asked: Asked) -> Ready | formats.BadRow:
        label = asked.row.get(self.expected)
        told = is_told(label) or (label == "" and self.problem == losses.SEVERAL)
        known = label if told and self.reading.with_labels else classify.UNTOLD
        try:
            row = classify_pictures.convert_picture({**asked.row, self.expected: known})
        except formats.BadRow as bad:
            return bad
        [(_, [made])] = self.pictures.encode([[(asked.place, row)]])
        if isinstance(made, formats.BadRow):
            return made
        return Ready(1, {"image": made[0].others["image"], "labels": made[0].labels})
