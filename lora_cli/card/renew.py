"""Put a new card where one is already, without losing what a person wrote there."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from lora_cli.card.facts import Facts
from lora_cli.card.metadata import make_metadata
from lora_cli.card.text import make_text
from lora_cli.common import library_errors
from lora_cli.recipe import strict_yaml

BEGIN = re.compile(
    r"<!-- made by lora: text (?P<text>[0-9a-f]{16}), metadata (?P<data>[0-9a-f]{16}) -->"
)
END = "<!-- end of what lora made; what stands before and after stays -->"
FRONT = re.compile(
    r"\A(?:\ufeff)?---[ \t]*\r?\n(?P<data>.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE
)

WRITTEN = ("base_model", "library_name", "licence", "model_name", "pipeline_tag", "tags")
"""Metadata that PEFT and TRL write by themselves."""


class Card(NamedTuple):
    """A card, and what was kept of the one before it, in words."""

    text: str
    kept: str = ""


def make_card(facts: Facts, before: str = "") -> Card:
    """Return the card of an artefact, with what a person wrote in the one `before`.

    Metadata and the section between our marks are made anew. A section that was changed, and a
    card that is neither ours nor PEFT's template, stay as they are. LoraError for metadata that
    cannot be read.
    """
    data, text = make_metadata(facts), make_text(facts)
    front, body = split_card(before)
    place = _find_section(body)
    if not before.strip() or (place is None and _is_template(body)):
        own = _find_own(front)
        kept = "kept what you have written: metadata" if own else ""
        return Card(_write(data | own, data, text, "", ""), kept)
    if place is None:
        return Card(before, "it is not lora's: it stays as it is")
    start, section, end = place
    marks = BEGIN.match(body, start)
    assert marks, "_find_section has looked"
    if _digest(section) != marks["text"]:
        return Card(before, "what stands between lora's marks was changed: it stays as it is")
    theirs = _read_metadata(front)
    changed = _digest(_dump(theirs)) != marks["data"]
    merged = data | theirs if changed else data
    ahead, behind = body[:start].strip("\n"), body[end:].strip("\n")
    added = [what for what, there in (("metadata", changed), ("text", ahead or behind)) if there]
    kept = f"kept what you have written: {' and '.join(added)}" if added else ""
    return Card(_write(merged, data, text, ahead, behind), kept)


def split_card(text: str) -> tuple[str, str]:
    """Return the metadata of a card, as YAML, and the rest."""
    found = FRONT.match(text)
    return (found["data"], text[found.end() :]) if found else ("", text)


def is_edited(text: str) -> bool:
    """Return whether a person wrote in this card."""
    front, body = split_card(text)
    place = _find_section(body)
    if not text.strip() or (place is None and _is_template(body)):
        return bool(_find_own(front))
    if place is None:
        return True
    start, section, end = place
    marks = BEGIN.match(body, start)
    rest = body[:start].strip() + body[end:].strip()
    whole = marks is not None and _digest(section) == marks["text"] and not rest
    return not (whole and marks and _digest(_dump(_read_metadata(front))) == marks["data"])


def _find_section(body: str) -> tuple[int, str, int] | None:
    """Return where our section begins, what it says, and where it ends; None where it is not."""
    begin = BEGIN.search(body)
    end = body.find(END, begin.end()) if begin else -1
    if begin is None or end < 0:
        return None
    return begin.start(), body[begin.end() : end].strip("\n"), end + len(END)


def _write(data: dict[str, Any], ours: dict[str, Any], text: str, ahead: str, behind: str) -> str:
    mark = f"<!-- made by lora: text {_digest(text)}, metadata {_digest(_dump(ours))} -->"
    parts = [f"---\n{_dump(data)}---", ahead, f"{mark}\n\n{text}\n\n{END}", behind]
    return "\n\n".join(part for part in parts if part) + "\n"


def _dump(data: dict[str, Any]) -> str:
    return strict_yaml.dump(data) if data else ""


def _read_metadata(front: str) -> dict[str, Any]:
    with library_errors.translate_file_errors(
        "the metadata in README.md is none", "mend README.md"
    ):
        read = ModelCard(f"---\n{front}---\n", ignore_metadata_errors=True)
    return dict(read.data.to_dict())


def _find_own(front: str) -> dict[str, Any]:
    """Return what a person added to the metadata of a library's template."""
    if not front.strip():
        return {}
    return {key: value for key, value in _read_metadata(front).items() if key not in WRITTEN}


def _digest(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _is_template(body: str) -> bool:
    """Return whether this is huggingface_hub's empty template, as PEFT and TRL save it."""
    plain, *rest = re.split(r"^### Framework versions", body, flags=re.MULTILINE)
    if not all(re.fullmatch(r"- .+ \S+", line) for line in _squeeze("".join(rest)).splitlines()):
        return False  # somebody wrote on after the versions
    return _squeeze(plain) == _squeeze(_make_template())


@cache
def _make_template() -> str:
    return split_card(str(ModelCard.from_template(ModelCardData())))[1]


def _squeeze(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
