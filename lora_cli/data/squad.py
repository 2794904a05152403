"""Read the questions of a file as SQuAD's are: one JSON object, with texts and their questions
inside of each other. Each question becomes a row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_cli.data.formats import BadRow, refuse_repeated
from lora_cli.data.json_text import RepeatedKey, Text, walk_member

LOOKED_AT = 2**16
"""Characters from the first in which the form shows."""
BEGINNING = re.compile(r'"data"\s*:\s*\[\s*\{')
PARAGRAPHS = re.compile(r'"paragraphs"\s*:\s*\[')
LONGEST_NAME = 80


def is_squad(stream: TextIO) -> bool:
    """Return whether a text begins as SQuAD's files do; it is then read from its beginning."""
    head = stream.read(LOOKED_AT)
    stream.seek(0)
    return bool(BEGINNING.search(head) and PARAGRAPHS.search(head))


def read_questions(file: Path, text: Text) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield each question with its `context` and its place: its id, or where it stands, as
    `data.3.paragraphs.1.qas.0`."""
    for number, article in enumerate(walk_member(text, "data")):
        if isinstance(article, RepeatedKey):
            yield f"{file}, data.{number}", refuse_repeated(article)
            continue
        yield from _walk_article(str(file), f"data.{number}", article)


def _walk_article(
    file: str, where: str, article: Any
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    for place, paragraph in _walk_list(file, where, article, "paragraphs"):
        if isinstance(paragraph, BadRow):
            yield f"{file}, {place}", paragraph
            continue
        context = {name: value for name, value in paragraph.items() if name != "qas"}
        for inside, question in _walk_list(file, place, paragraph, "qas"):
            if isinstance(question, BadRow):
                yield f"{file}, {inside}", question
                continue
            name = question.get("id")
            named = isinstance(name, (str, int)) and str(name).strip()
            place_of = f"question {str(name)[:LONGEST_NAME]}" if named else inside
            yield f"{file}, {place_of}", {**context, **question}


def _walk_list(
    file: str, where: str, holder: Mapping[str, Any], key: str
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield the mappings of a list in a mapping, each with its place; BadRow for anything else."""
    values = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(values, list):
        yield where, BadRow(f"there is no list of {key}")
        return
    for number, value in enumerate(values):
        if isinstance(value, dict):
            yield f"{where}.{key}.{number}", value
        else:
            said = f"it is {json.dumps(value)[:40]}, not a mapping"
            yield f"{where}.{key}.{number}", BadRow(f"one of {key} is not a mapping", said)
