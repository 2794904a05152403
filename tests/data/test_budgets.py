"""How much a file of rows may ask for: the length of lines and lists, columns, what is packed.

Hermetic: files in a temporary folder. Alone: pytest tests/data/test_budgets.py
"""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lora_cli.common.errors import LoraError
from lora_cli.data import column_kinds, json_rows, json_text, readers, tables, text_files


def read(path: Path) -> list[object]:
    return [row for _, row in readers.read(path)]


def test_a_list_is_read_piece_by_piece_as_json_reads_it(tmp_path: Path, monkeypatch) -> None:
    """Whole lists and damaged ones, with the same rows or the same place of the error."""
    monkeypatch.setattr(json_text, "PIECE", 7)
    chosen, file = random.Random(1), tmp_path / "rows.json"
    values = [1, -2.5e3, None, True, "x\u2028ü\\n", [1, {"a": []}], {}]
    refused = 0
    for number in range(600):
        rows = [
            {chosen.choice('abé\n"'): chosen.choice(values)} for _ in range(chosen.randint(0, 4))
        ]
        text = json.dumps(rows, indent=chosen.choice([None, 1, "\t"]), ensure_ascii=number % 3 == 0)
        text = chosen.choice(["", " \n", "\n\n"]) + text + chosen.choice(["", " \n"])
        if number % 2:
            at = chosen.randrange(text.index("[") + 1, len(text))
            text = text[:at] + chosen.choice(["", *'[]{},:"x1 \n']) + text[at + number % 3 - 1 :]
        file.write_text(text, newline="", encoding="utf-8")
        try:
            wanted = json.loads(text)
        except json.JSONDecodeError as error:
            refused += 1
            with pytest.raises(LoraError) as found:
                read(file)
            place = f"{file}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}"
            assert found.value.message == place, text
        else:
            assert [row for row in read(file) if isinstance(row, dict)] == [
                row for row in wanted if isinstance(row, dict)
            ]
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", '{"text": "', '"}\n'),
        ("a.txt", "", "\n"),
        ("a.csv", "text\n", "\n"),
        ("a.csv", 'text\n"', '"\n'),
        ("a.json", '[{"text": "', '"}]'),
        ("a.jsonl.gz", '{"text": "', '"}\n'),
    ],
)
def test_rows_may_be_long_but_not_longer(
    tmp_path: Path, name: str, before: str, after: str, monkeypatch
) -> None:
    for module in (readers, json_rows, json_text, tables, text_files):
        monkeypatch.setattr(module, "LONGEST", 5000)
    monkeypatch.setattr(json_text, "PIECE", 1000)
    for length, fits in ((4000, True), (20_000, False)):
        text = (before + "x" * length + after).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        if fits:
            assert read(tmp_path / name) == [{"text": "x" * length}]
        else:
            with pytest.raises(LoraError, match=r"over 5,000 characters|field limit \(5000\)"):
                read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_what_is_packed_may_not_grow_without_end(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST", 10**5)
    monkeypatch.setattr(text_files, "RATIO", 20)
    rows = [{"text": "x"}] * 30_000
    text = (
        json.dumps(rows) if "jsonl" not in name else "".join(f"{json.dumps(row)}\n" for row in rows)
    )
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(LoraError, match="20 times its size"):
        read(tmp_path / name)
    monkeypatch.setattr(text_files, "RATIO", 400_000)
    assert len(read(tmp_path / name)) == 30_000


def test_a_table_has_some_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(map(str, range(400_000))) + "\n")
    with pytest.raises(LoraError, match="has 400,000 columns"):
        read(tmp_path / "a.csv")


TURNS = [{"role": "user", "content": "é"}]


def write_arrow(path: Path, table: pyarrow.Table) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    if path.suffix == ".parquet":
        parquet.write_table(table, path, compression="zstd", store_schema=False)
    elif path.stem == "stream":
        with pyarrow.ipc.new_stream(path, table.schema, options=options) as writer:
            writer.write_table(table)
    else:
        with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_tables_are_read_in_a_process_with_limits(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"x{number}", "turns": TURNS} for number in range(1234)]
    write_arrow(tmp_path / name, pyarrow.Table.from_pylist(rows))
    both = zip(readers.read(tmp_path / name), readers.read(tmp_path / name))  # two at once
    assert [one[1] for one, other in both if one == other] == rows
    long = pyarrow.DictionaryArray.from_arrays(np.zeros(10**4, np.int32), ["a" * 10**7])
    if "parquet" not in name:
        long = pyarrow.array(["a" * 10**8] * 12)
    write_arrow(tmp_path / name, pyarrow.table({"text": long}))
    assert (tmp_path / name).stat().st_size < 400_000
    with pytest.raises(LoraError, match="need over 1024 MiB to read"):
        read(tmp_path / name)
    write_arrow(tmp_path / name, pyarrow.table({"text": ["a"]}))
    assert read(tmp_path / name) == [{"text": "a"}]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.jsonl.gz", "a.jsonl"])
def test_a_file_has_fewer_rows_than_bytes(tmp_path: Path, name: str, monkeypatch) -> None:
    """Packed, one row may stand for any number; each takes time to tokenise."""
    monkeypatch.setattr(readers, "MOST_ROWS", 2000)
    path = tmp_path / name
    for count in (1999, 20_000):
        if "json" in name:
            text = b'{"a":1}\n' * count
            path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        else:
            same = pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int8), ["x"])
            write_arrow(path, pyarrow.table({"a": same}))
        assert (path.stat().st_size < count) == (name != "a.jsonl")
        if count < 2000 or name == "a.jsonl":
            assert len(read(path)) == count
        else:
            with pytest.raises(LoraError, match=f"rows in {path.stat().st_size:,} bytes"):
                read(path)


def name_often(kind: str) -> pyarrow.Array:
    """A hundred kilobytes, named by 1,000 rows."""
    text, zeros = "x" * 10**5, np.zeros(1000, np.int32)
    if kind == "dictionary":
        return pyarrow.DictionaryArray.from_arrays(zeros, [text])
    if kind == "list of dictionaries":
        inner = pyarrow.DictionaryArray.from_arrays(zeros, [text])
        return pyarrow.ListArray.from_arrays(np.arange(1001, dtype=np.int32), inner)
    if kind == "views of a list":
        sizes = np.ones(1000, np.int32)
        return pyarrow.ListViewArray.from_arrays(zeros, sizes, pyarrow.array([{"a": text}]))
    if kind == "views of numbers":
        sizes = np.full(1000, 20_000, np.int32)
        return pyarrow.ListViewArray.from_arrays(zeros, sizes, np.zeros(20_000, np.int64))
    return pyarrow.RunEndEncodedArray.from_arrays(np.array([1000], np.int32), [text])


@pytest.mark.parametrize(
    "kind",
    ["dictionary", "list of dictionaries", "views of a list", "views of numbers", "run ends"],
)
def test_a_value_counts_each_time_that_a_table_names_it(tmp_path: Path, kind: str) -> None:
    with pyarrow.ipc.new_file(
        tmp_path / "a.arrow", pyarrow.schema([("text", name_often(kind).type)])
    ) as writer:
        writer.write_table(pyarrow.table({"text": name_often(kind)}))
    assert (tmp_path / "a.arrow").stat().st_size < 400_000
    with pytest.raises(LoraError, match="unpacks to over 64 MiB"):
        read(tmp_path / "a.arrow")


def test_whether_a_column_has_numbers_is_told_in_time() -> None:
    """Of 60,000 spaces, tried in every place for both sides of a sign that is not there: 7 s."""
    numbers = ["5", " -5 % ", "1,000.5", "50%\n"]
    assert column_kinds.tell_kinds([{"a": text} for text in numbers]) == {"a": "numbers"}
    began = time.process_time()
    assert column_kinds.tell_kinds([{"a": "5" + " " * 60_000 + "x"}]) == {"a": ""}
    assert time.process_time() - began < 1
