"""Read what models answered: the sample prompts of a run, and the rows of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.common import escape, privacy
from lora_cli.report.metrics import parse_object, read_lines

LONGEST = 1500
"""Characters of a text that are shown."""
MOST_PROMPTS, MOST_ROWS = 6, 6
"""Sample prompts and rows of an evaluation that are shown."""
JUDGES = ("exact", "normalised", "numeric", "json_equal")
"""The metrics that call an answer right or wrong; the first that was counted is shown."""
MOST_COMPARED = 20_000
"""Rows of an evaluation among which those are looked for that differ."""


@dataclass
class Samples:
    """The answers to the sample prompts: of each prompt, by the step that they were given at; step
    0 is the base."""

    prompts: dict[str, dict[int, str]] = field(default_factory=dict)
    unreadable: int = 0


@dataclass
class Row:
    """A row of an evaluation: what was asked, what is right, and each model's answer by its
    label."""

    row: int
    place: str
    prompt: str
    expected: str | None
    answers: dict[str, str] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    """Whether an answer is right, such as `exact: wrong`, where that was scored."""

    @property
    def differs(self) -> bool:
        """Whether the models answered otherwise than each other."""
        return len(set(self.answers.values())) > 1


def read_samples(path: Path) -> Samples:
    """Return the answers to the first MOST_PROMPTS sample prompts; none where there is no file.
    LoraError where it is no file, or may not be read."""
    found = Samples()
    for line in read_lines(path):
        said = parse_object(line) or {}
        step, prompt, answer = (said.get(name) for name in ("step", "prompt", "answer"))
        if type(step) is not int or not isinstance(prompt, str) or not isinstance(answer, str):
            found.unreadable += 1
            continue
        prompt = show(prompt)
        if prompt in found.prompts or len(found.prompts) < MOST_PROMPTS:
            found.prompts.setdefault(prompt, {})[step] = show(answer)
    return found


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the rows of an evaluation's answers.jsonl that are shown, those first that models
    answered otherwise, and how many lines could not be read."""
    digests: dict[int, dict[str, bytes]] = {}
    unreadable = 0
    for line in read_lines(path):
        said = _parse_answer(line)
        if said is None:
            unreadable += 1
        elif said["answer"] is not None and (
            said["row"] in digests or len(digests) < MOST_COMPARED
        ):
            digest = hashlib.blake2b(said["answer"].encode("utf-8", "replace"), digest_size=8)
            digests.setdefault(said["row"], {})[said["model"]] = digest.digest()
    ordered = sorted(digests, key=lambda row: (len(set(digests[row].values())) < 2, row))
    shown = {row: None for row in ordered[:MOST_ROWS]}
    rows = _collect(path, shown)
    return [rows[row] for row in shown if row in rows], unreadable


def _collect(path: Path, wanted: Mapping[int, None]) -> dict[int, Row]:
    """Return the rows of these numbers."""
    rows: dict[int, Row] = {}
    for line in read_lines(path):
        said = _parse_answer(line)
        if said is None or said["row"] not in wanted:
            continue
        prompt, place = (show(str(said.get(name) or "")) for name in ("prompt", "place"))
        expected = said.get("expected")
        right = show(expected) if isinstance(expected, str) else None
        row = rows.setdefault(said["row"], Row(said["row"], place, prompt, right))
        label = show(said["model"])
        row.answers[label] = "(none)" if said["answer"] is None else show(said["answer"])
        scores = said.get("scores")
        for name in reversed(JUDGES):
            if isinstance(scores, dict) and isinstance(scores.get(name), (int, float)):
                row.marks[label] = f"{name}: {'right' if scores[name] == 1 else 'wrong'}"
    return rows


def _parse_answer(line: bytes) -> dict[str, Any] | None:
    """Return a line of answers.jsonl, whose `answer` is None where there is none; None for a line
    that is none."""
    said = parse_object(line)
    if said is None or type(said.get("row")) is not int:
        return None
    answer = said.setdefault("answer", None)
    texts = isinstance(said.get("model"), str) and (answer is None or isinstance(answer, str))
    return said if texts else None


def show(text: str) -> str:
    r"""Return a stranger's text as a page may hold it: without secrets, its controls written out as
    `\x1b`, and cut where it is long, which it says."""
    cut = privacy.mask_secrets(privacy.replace_home(text[: 2 * LONGEST]))
    more = len(text) > LONGEST
    said = escape(cut[:LONGEST] if more else cut, "\n\t")
    return f"{said}… (cut here; {len(text):,} characters in all)" if more else said
