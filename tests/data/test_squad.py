"""SQuAD's own files: which questions come out, with which place, and what a damaged file is told.

Hermetic: files in a temporary folder. Alone: pytest tests/data/test_squad.py
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lora_cli.common.errors import LoraError
from lora_cli.data import json_text, readers
from lora_cli.data.formats import BadRow


def read(path: Path) -> list[tuple[str, Any]]:
    return [(place.removeprefix(str(path)), row) for place, row in readers.read(path)]


def question(name: str | None, **more: Any) -> dict[str, Any]:
    asked = {"question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    return asked | ({"id": name} if name else {}) | more


FILE = {
    "version": "v2.0",
    "data": [
        {
            "title": "A",
            "paragraphs": [
                {"context": "Ann came.", "qas": [question("56be"), question(None)]},
                {"context": "Ann left.", "qas": []},
            ],
        },
        {"paragraphs": [{"qas": [question("9", is_impossible=True)], "context": "Ann.", "n": 1}]},
    ],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["s.json", "s.json.gz", "s.jsonl"])
def test_each_question_is_a_row_with_its_text(tmp_path: Path, name: str, indent) -> None:
    path, text = tmp_path / name, json.dumps(FILE, indent=indent)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = read(path)
    assert [place for place, _ in found] == [
        ", question 56be",
        ", data.0.paragraphs.0.qas.1",
        ", question 9",
    ]
    assert found[0][1] == {"context": "Ann came.", **question("56be")}
    assert found[2][1] == {"context": "Ann.", "n": 1, **question("9", is_impossible=True)}


def test_a_long_file_on_one_line_is_read_and_one_row_after_another(tmp_path: Path) -> None:
    """A file of 12 million characters, over what a line may have; the first question comes before
    the text is read to its end."""
    context = "Ann came. " * 2000
    article = {"paragraphs": [{"context": context, "qas": [question(None)]}] * 10}
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"data": [article] * 60, "version": "1.1"}))
    assert path.stat().st_size > 2 * json_text.LONGEST
    assert len(read(path)) == 600
    path.write_text(path.read_text()[:-40])
    rows = readers.read(path)
    assert next(rows)[1]["context"] == context
    with pytest.raises(LoraError, match=r"s.json:1:\d{8}: invalid JSON: "):
        list(rows)


def test_a_damaged_file_is_told_as_json_tells_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_text, "PIECE", 7)
    chosen, file, refused = random.Random(1), tmp_path / "s.json", 0
    for number in range(400):
        text = json.dumps(FILE | {"n": number}, indent=chosen.choice([None, 1]))
        text = text.replace('"n"', chosen.choice(['"n"', '"m" ']))
        at = chosen.randrange(text.index("Ann") + 1, len(text))
        text = text[:at] + chosen.choice(["", *'[]{},:"x1 \n']) + text[at + number % 3 - 1 :]
        file.write_text(text, newline="")
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            refused += 1
            with pytest.raises(LoraError) as found:
                read(file)
            place = f"{file}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}"
            assert found.value.message == place, text
        else:
            read(file)
    assert refused > 200


@pytest.mark.parametrize(
    ("data", "place", "said"),
    [
        ([{"paragraphs": [1]}], "data.0.paragraphs.0", "it is 1, not a mapping"),
        ([{"paragraphs": [{"context": "a"}]}], "data.0.paragraphs.0", "there is no list of qas"),
        ([{"paragraphs": [{"qas": [[]]}]}], "data.0.paragraphs.0.qas.0", "it is [], not a mapping"),
        ([{"paragraphs": []}, {"text": ""}], "data.1", "there is no list of paragraphs"),
        ([{"paragraphs": []}, 7], "data.1", "there is no list of paragraphs"),
    ],
)
def test_what_is_built_otherwise_is_a_bad_row(tmp_path: Path, data, place, said) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"data": data}))
    [(where, bad)] = read(path)
    assert where == f", {place}" and isinstance(bad, BadRow) and bad.said == said


def test_other_objects_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [{"data": [{"a": 1}]}, {"text": '{"data": [{"paragraphs": []}]}'}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == [(f":{number}", row) for number, row in enumerate(rows, 1)]
