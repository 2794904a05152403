"""`lora card`: print the card of an artefact, or write it where one may be already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_cli.card import (
    CARD,
    Facts,
    find_evaluations,
    make_card,
    read_evaluation,
    read_export,
    read_facts,
)
from lora_cli.common import LoraError, UsageError, files, plain_files, quote, ui


def show_card(path: Path, out: Path | None) -> None:
    """Print the card of `path` to stdout, or write it to `out`, in which what a person wrote
    stays."""
    facts = add_evaluations(read_facts(path), path)
    if out is None:
        ui.report_file(make_card(facts).text)
        return
    if not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"{out} is no file that can be written", f"-o {quote(out / CARD)}")
    before = plain_files.read_small(out) if out.exists() else ""
    made = make_card(facts, before)
    if made.kept:
        ui.say(f"{out}: {made.kept}")
    if made.text != before:
        files.write_text(out, made.text)
    ui.report_path(out)


def add_evaluations(facts: Facts, path: Path) -> Facts:
    """Return facts with what `lora evaluate` found in the run that the artefact came from."""
    found = find_evaluations(path, facts.training)
    return replace(facts, evaluations=tuple(read_evaluation(file) for file in found))


def add_files(facts: Facts, ggufs: Sequence[Path]) -> Facts:
    """Return facts with GGUF files that lie beside the model. LoraError for what is no such
    file."""
    for file in ggufs:
        if not (file.is_file() and plain_files.is_gguf(file)):
            raise LoraError(f"{file} is no GGUF file", f"ls {quote(file.parent)}")
    return replace(facts, ggufs=(*facts.ggufs, *map(read_export, ggufs)))
