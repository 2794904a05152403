"""Tell what labels texts, or pairs of texts, have: the predictor of models that classify them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lora_cli.data import classify, collate, encode, formats
from lora_cli.evaluate.opened import Opened
from lora_cli.evaluate.predictors import (
    Asked,
    Layout,
    Reading,
    Ready,
    find_unfinished,
    is_told,
    make_layouts,
    make_recipe,
    refuse_length,
)
from lora_cli.scoring import answers, find_scorer, losses


class Classifier:
    """Answers with labels and their probabilities, or with measured values."""

    expected: ClassVar[str] = "label"
    shown: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    layouts: ClassVar[Sequence[Layout]] = make_layouts(classify.LabelEncoder, expected)

    def __init__(self, model: Opened, reading: Reading) -> None:
        self.model, self.reading = model, reading
        self.problem = model.problem_type
        self.encoder = classify.LabelEncoder(model.tokenizer, make_recipe(model, reading))
        measured = losses.is_measured(self.problem)
        self.collate = collate.TaskCollator(model.tokenizer, by_token=False, measured=measured)
        self.scorer = find_scorer(model.task)(model.labels, self.problem)

    @property
    def limit(self) -> int:
        """How many tokens a row may have."""
        return self.encoder.limit

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return the tokens of each row, with its label where it is told."""
        found: list[Ready | formats.BadRow | None] = [None] * len(rows)
        good: list[tuple[str, classify.Labelled]] = []
        places = []
        for at, asked in enumerate(rows):
            try:
                good.append(("", self._convert(asked)))
                places.append(at)
            except formats.BadRow as bad:
                found[at] = bad
        for _, made in self.encoder.encode([good]):
            for at, row in zip(places, made):
                found[at] = row if isinstance(row, formats.BadRow) else self._finish(row[0])
        return [each for each in found if each is not None]

    def _convert(self, asked: Asked) -> classify.Labelled:
        """Return a row's text or texts, with its label where it is told."""
        row = classify.convert_unlabelled(asked.row)
        label = asked.row.get(self.expected)
        # of several labels a row may have none, which a table says by an empty text
        told = is_told(label) or (label == "" and self.problem == losses.SEVERAL)
        return row._replace(label=label) if told and self.reading.with_labels else row

    def _finish(self, row: encode.Encoded) -> Ready | formats.BadRow:
        try:
            refuse_length(len(row.input_ids), self.limit)
            self._refuse_ends(row)
        except formats.BadRow as bad:
            return bad
        columns = {"input_ids": row.input_ids, "labels": row.labels, **row.others}
        content = {name: values.tolist() for name, values in columns.items()}
        return Ready(len(row.input_ids), content, bool(row.uncut))

    def _refuse_ends(self, row: encode.Encoded) -> None:
        """Raise BadRow for a text with another number of end tokens than one, where the model looks
        at the last: it takes no batch in which they differ."""
        config = self.model.network.config
        if config.is_encoder_decoder and (row.input_ids == config.eos_token_id).sum() != 1:
            end = self.model.tokenizer.convert_ids_to_tokens(config.eos_token_id)
            raise formats.BadRow(
                "other end tokens than one",
                f"the text has not one {end} at its end, where this model looks",
            )

    def answer(self, batch: Sequence[Ready]) -> list[answers.Answer | formats.BadRow]:
        """Return the labels of rows, or their values."""
        given = self.collate([row.content for row in batch])
        labels = given.pop("labels")
        logits = self.model.compute(given)
        bad = find_unfinished(self.model, logits)
        kept = [at for at, each in enumerate(bad) if each is None]
        self.scorer.add(logits[kept], labels[kept], {})
        said = answers.answer_labels(
            logits.numpy(), self.model.labels, self.problem, self.reading.everything
        )
        return [each or answer for each, answer in zip(bad, said)]

    def list_notes(self) -> list[str]:
        """Return nothing: all is in the answers."""
        return []
