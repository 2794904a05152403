"""Write what texts become: the predictor of models that read a text and write another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lora_cli.data import formats, pairs
from lora_cli.evaluate.opened import Opened
from lora_cli.evaluate.predictors import (
    Asked,
    Layout,
    Reading,
    Ready,
    is_told,
    make_layouts,
    make_recipe,
    refuse_length,
)
from lora_cli.models import decoder
from lora_cli.scoring import answers, find_scorer

USUAL_LENGTH = 128
"""Tokens of a target where neither the command line nor a record says more or less."""
INSTRUCTIONS: formats.Formats = {"instructions": ("instruction", "target")}


def _rename_outputs(sets: formats.ColumnSets) -> formats.ColumnSets:
    """Return the sets of columns with an instruction: what it becomes is a target, too."""
    found = [
        {("target" if ours == "output" else ours): theirs for ours, theirs in names.items()}
        for names in sets
        if "instruction" in names
    ]
    return [*found, {"instruction": "instruction", "target": "output"}]


def _make_layouts() -> tuple[Layout, ...]:
    """Return what rows may be: instructions, or sources; with their targets, and without."""
    told = Layout(
        {"pairs": pairs.PairEncoder.row_formats["pairs"], **INSTRUCTIONS},
        [*_rename_outputs(pairs.PairEncoder.column_sets), *pairs.PairEncoder.column_sets],
    )
    without = make_layouts(pairs.PairEncoder, "target")[1]
    sources = {"pairs": ("source",), "instructions": ("instruction",), "text": ("text",)}
    return told, Layout(sources, [names for names in without.sets if "output" not in names])


class PairWriter:
    """Answers with the text that a source becomes, written greedily, or as the model's
    generation_config.json says: as `lora generate` writes it, and an evaluation."""

    expected: ClassVar[str] = "target"
    shown: ClassVar[tuple[str, ...]] = ("source", "instruction", "input", "text")
    layouts: ClassVar[Sequence[Layout]] = _make_layouts()

    def __init__(self, model: Opened, reading: Reading) -> None:
        self.model, self.reading = model, reading
        recipe = make_recipe(model, reading, "source_prefix", "max_target_length")
        self.encoder = pairs.PairEncoder(model.tokenizer, recipe)
        trained = recipe.data.max_target_length or model.trained_length
        self.most = reading.max_new_tokens or trained or USUAL_LENGTH
        self.scorer = find_scorer(model.task)()
        self.unfinished = 0

    @property
    def limit(self) -> int:
        """How many tokens a source may have."""
        return self.encoder.longest_source

    def prepare(self, rows: Sequence[Asked]) -> list[Ready | formats.BadRow]:
        """Return the tokens of each source, with its target where that is told."""
        found: list[Ready | formats.BadRow] = []
        for row in rows:
            try:
                found.append(self._prepare(row))
            except formats.BadRow as bad:
                found.append(bad)
        return found

    def _prepare(self, row: Asked) -> Ready:
        named = {"source": row.row.get("text")} if row.style == "text" else row.row
        source = pairs.read_source(named)
        target = row.row.get(self.expected)
        told = is_told(target) and self.reading.with_labels
        right = formats.get_filled_text(row.row, self.expected) if told else None
        [(_, [made])] = self.encoder.encode([[(row.place, pairs.Pair(source, right or ""))]])
        if isinstance(made, formats.BadRow):
            raise made
        [encoded] = made
        refuse_length(len(encoded.input_ids), self.limit)
        content = encoded.input_ids.tolist(), right
        return Ready(len(encoded.input_ids), content, bool(encoded.uncut))

    def answer(self, batch: Sequence[Ready]) -> list[answers.Answer | formats.BadRow]:
        """Return what each source becomes."""
        tokenizer, network = self.model.tokenizer, self.model.network
        rows = [row.content[0] for row in batch]
        sources = decoder.pad_sources(tokenizer, rows, network.device)
        written = decoder.write_targets(network, tokenizer, sources, self.most)
        self.unfinished += sum(not each.is_whole for each in written)
        told = [(each.text, row.content[1]) for each, row in zip(written, batch)]
        self.scorer.gathered += [(said, right) for said, right in told if right is not None]
        return [{"target": said} for said, _ in told]

    def list_notes(self) -> list[str]:
        """Return how many texts were not brought to an end."""
        if not self.unfinished:
            return []
        what = "1 text was" if self.unfinished == 1 else f"{self.unfinished} texts were"
        return [f"{what} not finished within --max-new-tokens {self.most}"]
