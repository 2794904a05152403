"""JSON files as people have them: one object that holds the rows, objects over many lines, a key
that is given twice, and what is no JSON, whose hint is pasted and mends it.

Hermetic: files made here. Alone: pytest tests/data/test_json_rows.py
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.common import LoraError
from lora_cli.data import json_text, readers, sources
from lora_cli.data.formats import BadRow, find_converter
from lora_cli.evaluate import held_out
from lora_cli.recipe import Data

ROWS = [{"prompt": f"ask {n}", "completion": f"ünswer {n}"} for n in range(5)]
TURNS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]


def read(path: Path, *columns: str) -> list[Any]:
    return [row for _, row in readers.read(path, {*columns})]


HELD: dict[str, tuple[Any, int | None]] = {
    "under data": ({"data": ROWS}, None),
    "under any key, on many lines": ({"version": 1, "my rows": ROWS, "tags": ["a"]}, 2),
    "beside what is longer than a part": ({"about": "x" * 300, "rows": ROWS, "n": list(range(90))}, 1),
    "beside an empty list": ({"rows": ROWS, "errors": []}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("piece", [150, 2**20])
def test_the_one_list_in_an_object_has_the_rows(
    name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, indent = HELD[name]
    monkeypatch.setattr(
        json_text, "PIECE", max(piece, 400 * (name == "beside what is longer than a part"))
    )
    path = tmp_path / "r.json"
    path.write_text(json.dumps(held, indent=indent))
    assert read(path) == ROWS
    place, _ = next(readers.read(path))
    assert place.startswith(f"{path}, row 1 of ")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"mine": TURNS},
        {"prompt": "ask", "completion": "answer", "tools": [{"type": "function"}]},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"tokens": ["a", "b"], "tags": ["O", "O"]},
        {"spans": [{"start": 0}], "text": "ask"},
        {"passage": "ask", "asked": "what", "answers": [{"text": "ask", "answer_start": 0}]},
        ROWS[0],
    ],
)
def test_an_object_that_is_a_row_is_one(row: dict[str, Any], indent: int, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row, indent=indent))
    assert read(path) == [row]


ARTICLE = {"article": "abc", "highlights": "q", "refs": [{"start": 1}]}
NESTED = {"source": {"text": "a"}, "target": {"text": "b"}}
ITEMS = {"name": "mine", "items": [{"q": "ask", "a": "answer"}]}


@pytest.mark.parametrize(
    ("ending", "indent", "row", "columns"),
    [
        ("jsonl", None, ARTICLE, ()),
        ("jsonl.gz", None, ARTICLE, ()),
        ("json", None, ARTICLE, ()),
        ("json", 1, ARTICLE, ()),
        ("jsonl", None, {"refs": [{"start": 1}], "n": 1}, ()),
        ("json", None, {"refs": [{"start": 1}], "n": 1}, ("refs", "n")),
        ("json", 1, {"data": [{"start": 1}], "n": 1}, ("data",)),
        ("json", None, {"text": "a", "refs": [{"text": "b"}]}, ("text",)),
        ("jsonl", None, NESTED, ()),
        ("json", None, NESTED, ()),
        ("jsonl", None, {"left": {"text": "a"}, "right": {"text": "b"}}, ()),
        ("json", 1, {"left": {"text": "a"}, "right": {"text": "b"}}, ("left", "right")),
    ],
)
def test_a_row_alone_in_its_file_is_one(
    ending: str, indent: int, row: dict[str, Any], columns: tuple[str, ...], tmp_path: Path
) -> None:
    """Whatever lists and mappings are in its columns; of those that are named, in any shape."""
    path = tmp_path / f"r.{ending}"
    text = json.dumps(row, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    assert read(path, *columns) == [row]


def test_the_columns_that_are_named_say_what_the_rows_are(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(ITEMS))
    assert read(path) == [ITEMS]
    assert read(path, "q", "a") == ITEMS["items"]
    for columns, rows in [({"prompt": "name"}, [ITEMS]), ({"prompt": "q"}, ITEMS["items"])]:
        data = Data(path=str(path), columns=columns)
        source = sources.find_source(data, "path", str(path), "train")
        assert [row for _, row in source.read_rows()] == rows
    held = held_out.read_held_out(str(path), {"prompt": "q", "completion": "a"}, {}, None)
    assert [row.expected for row in held.rows] == ["answer"]


def test_the_first_row_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([lines[0].removesuffix("}"), *lines[1:]]))
    first, *others = read(path)
    assert isinstance(first, BadRow) and "invalid JSON" in first.said
    assert others == ROWS[1:]
    path.write_text("\n".join(['{"about": 1, "rows": [', lines[0], "]}"]))  # that goes on
    assert read(path) == ROWS[:1]


def test_objects_may_have_many_lines_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "PIECE", 30)
    path = tmp_path / "r.json"
    path.write_text("\n\n".join(json.dumps(row, indent=1) for row in ROWS) + "\n")
    assert list(map(str, dict(readers.read(path)))) == [f"{path}, row {n}" for n in range(1, 6)]
    assert read(path) == ROWS


# name -> content; of each the hint is pasted into a shell, and makes the rows of it
PASTED: dict[str, str] = {
    "two lists": json.dumps({"train": ROWS, "test": [{"text": "x"}]}),
    "two lists, the likelier later": json.dumps({"features": [{"n": 0}], "rows": ROWS}, indent=1),
    "a column of all values each": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "as pandas writes": json.dumps(
        {key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}
    ),
    "rows by their names": json.dumps({f"r{n}": row for n, row in enumerate(ROWS)}, indent=2),
    "rows by their numbers": json.dumps({str(n): row for n, row in enumerate(ROWS)}),
    "a comma after each": "".join(f"{json.dumps(row)},\n" for row in ROWS[:-1]) + json.dumps(ROWS[-1]),
    "a comment above": "// mine\n" + json.dumps(ROWS),
    "a block of comments above": "/* mine\n * yours */\n" + json.dumps(ROWS),
    "a block on its line": "/* mine */\n" + json.dumps(ROWS),
    "comments of all kinds": "/* a */ " + "\n# b\n /* c **/\n// d\n".join(map(json.dumps, ROWS)),
    "a conversation's turns": json.dumps(TURNS, indent=1),
    "conversations without a name": json.dumps([TURNS, TURNS]),
    "as Python writes": "".join(f"{row}\n" for row in ROWS),
}  # fmt: skip


def is_mended(path: Path) -> list[Any]:
    """The rows of the file that the hint of this one's error makes."""
    hint = refused(path)[1]
    command, _, name = hint.rpartition("; then name ")
    subprocess.run(command, shell=True, check=True, cwd=path.parent, executable="/bin/bash")
    return read(path.parent / name.strip("'"))


def refused(path: Path) -> tuple[str, str]:
    """What is said of a file's first bad row, or of the file, and the hint."""
    try:
        bad = next(row for row in read(path) if isinstance(row, BadRow))
        return bad.said, bad.hint
    except LoraError as error:
        return error.message, error.hint or ""


@pytest.mark.parametrize("name", PASTED)
@pytest.mark.parametrize("packed", [False, True])
def test_the_hint_makes_rows_of_what_is_none(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("my rows.json" + ".gz" * packed)
    content = PASTED[name].encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    made = is_mended(path)
    assert made == ROWS or made in ([{"messages": TURNS}], [{"messages": TURNS}] * 2)


def test_a_later_second_list_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "PIECE", 150)
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(LoraError, match="several lists of rows: train, test"):
        read(path)


TWICE: dict[str, tuple[str, Callable[[Path], str]]] = {
    "a line": ('{"a": 1}\n{"text": "x", "a": 1, "text": "y"}\n', lambda path: f"{path}:2"),
    "a message": ('{"messages": [{"text": "x", "text": "y"}]}', lambda path: f"{path}:1"),
    "a list": ('[{"a": 1}, {"b": {"text": "x", "text": "y"}}, {"a": 1}]', lambda p: f"{p}, row 2"),
    "a held list": ('{"data": [{"text": [], "text": {}}]}', lambda p: f"{p}, row 1 of data"),
    "many lines": ('{\n"text": 1,\n"text": 2}', lambda path: f"{path}, row 1"),
    "SQuAD": (
        '{"data": [{"title": "a", "paragraphs": []}, {"text": 1, "text": 2, "paragraphs": []}]}',
        lambda path: f"{path}, data.1",
    ),
}


@pytest.mark.parametrize(
    "content",
    [
        '{"rows": [{"a": 1}], "rows": [{"a": 2}]}',
        '{"rows": [{"a": 1}], "rows": [{"a": 1}]}',
        '{"rows": [{"a": 1}], "n": [], "rows": []}',
        '{"rows": 5,\n"rows": [{"a": 2}]}',
    ],
)
def test_a_list_of_rows_given_twice_is_told(content: str, tmp_path: Path) -> None:
    """And no command makes lines of it, which would keep one of them."""
    path = tmp_path / "r.json"
    path.write_text(content)
    said, hint = refused(path)
    assert said == f"{path}: rows is given twice"
    assert hint == "leave one of the two out, or give it another name"


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{\n [1]: 2}")
    assert refused(path)[0].startswith(f"{path}:2:2: invalid JSON: Expecting property name")


@pytest.mark.parametrize("name", TWICE)
def test_a_key_with_two_values_is_told(name: str, tmp_path: Path) -> None:
    content, where = TWICE[name]
    path = tmp_path / "r.json"
    path.write_text(content)
    bad = [(place, row) for place, row in readers.read(path) if isinstance(row, BadRow)]
    assert [(place, row.said) for place, row in bad] == [
        (where(path), "text is given twice, with two values")
    ]


@pytest.mark.parametrize(
    ("style", "row"),
    [
        ("messages", {"messages": '[{"role": "user", "role": "assistant", "content": "x"}]'}),
        ("messages", {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [
            {"name": "f", "arguments": '{"role": 1, "role": 2}'}]}]}),
        ("messages", {"messages": TURNS, "tools": ['{"role": "x", "role": "y"}']}),
    ],
)  # fmt: skip
def test_a_key_with_two_values_inside_a_text_is_told(style: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="role is given twice"):
        find_converter(style)(row)


def test_a_key_that_says_the_same_twice_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "x", "text": "x", "n": NaN}\n{"n": 1, "n": true}\n')
    first, second = read(path)
    assert first["text"] == "x" and isinstance(second, BadRow)  # True is 1 to Python alone
    assert second.said == "n is given twice, with two values"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("r.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("r.jsonl", b"<!DOCTYPE html>\n<html></html>\n", "a web page"),
        ("r.csv", b"PK\x03\x04" + bytes(60), "a ZIP archive"),
    ],
)
def test_what_is_no_file_of_rows_is_told(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraError, match=re.escape(f"{name} is ") + ".*" + what):
        read(tmp_path / name)


def test_a_text_may_begin_as_a_web_page_does(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("<html> is a tag\n")
    assert read(path) == [{"text": "<html> is a tag"}]


def test_a_mistake_in_a_long_line_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("[" + ", ".join([json.dumps(ROWS[0])] * 50) + ", oops]")
    message, hint = refused(path)
    shown = subprocess.run(hint, shell=True, capture_output=True, text=True, check=True)
    assert message.startswith(f"{path}:1:")
    assert "oops" in shown.stdout and len(shown.stdout) < 100


def test_in_a_folder_such_a_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "my rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (folder / "b.json").write_text(json.dumps({"data": ROWS}))
    data = Data(path=str(folder))
    with pytest.raises(LoraError, match="b.json is one object that holds its rows") as refused:
        sources.find_source(data, "path", str(folder), "train")
    assert refused.value.hint == f"--set data.path='{folder}/b.json'"
    (folder / "b.json").write_text(json.dumps(ROWS))
    assert sources.find_source(data, "path", str(folder), "train").table is not None


def open_folder(folder: Path) -> sources.Source:
    return sources.find_source(Data(path=str(folder)), "path", str(folder), "train")


def test_in_a_folder_a_file_that_is_not_read_is_none_of_rows(tmp_path: Path) -> None:
    """Beside rows that `datasets` finds by their name, whatever lies there is let be."""
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "schema.json").write_text(json.dumps({"fields": [{"name": "prompt"}]}))
    (tmp_path / "old.json").mkdir()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    assert [row for _, row in open_folder(tmp_path).read_rows()] == ROWS[:1]
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(LoraError, match="schema.json is one object that holds its rows"):
        open_folder(tmp_path)


def test_in_a_folder_a_file_that_cannot_be_opened_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is the test's own: root, who may run this, can open every file."""

    def refuse(file: Path, columns: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "schema.json").write_text("{}")
    monkeypatch.setattr(sources.json_rows, "find_lists", refuse)
    assert [row for _, row in open_folder(tmp_path).read_rows()] == ROWS[:1]


def test_a_folder_of_pictures_may_have_such_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    coco = {"images": [{"id": 0}], "annotations": [{"id": 0}]}
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(coco))
    assert len(open_folder(tmp_path).files) == 2
    assert f"1 file of {tmp_path} is left out, by their names" in capsys.readouterr().err
    (tmp_path / "notes.md").write_text("mine")
    open_folder(tmp_path)
    assert f"2 files of {tmp_path} are left out, by their names" in capsys.readouterr().err
