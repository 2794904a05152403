"""Prepared rows on disk: taken again only where everything that decides them is the same; whole or
not there.

Hermetic: the tiny model's tokenizer, files in a temporary folder. Alone: pytest
tests/data/test_cache.py
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from transformers import AddedToken, PreTrainedTokenizerBase

from lora_cli.common.errors import LoraError
from lora_cli.data import cache, prepare
from lora_cli.data.encode import Renderer
from lora_cli.data.load import load_rows
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.tasks import TASKS

ROWS = [{"prompt": f"ask {number}", "completion": "answer " * number} for number in range(1, 31)]


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny / "model"))


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch):
    """`load(*overrides)` prepares rows.jsonl, with a cache of its own."""
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: x}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n"
    )

    def run(*overrides: str, day: date | None = None) -> prepare.Prepared:
        return load_rows(load_recipe(tmp_path / "r.yaml", list(overrides)), tokenizer, day)[0]

    return run


def entries() -> list[Path]:
    return sorted(cache.find_folder().iterdir())


def test_the_same_rows_are_not_prepared_twice(load, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    once = load("training.max_length=64")
    monkeypatch.setattr(Renderer, "encode", None)
    again = load("training.max_length=64")
    assert f"rows.jsonl: prepared before, in {entries()[0]}" in capfd.readouterr().err
    assert again.rows[:] == once.rows[:]
    assert (again.counts, again.fingerprint) == (once.counts, once.fingerprint)
    assert [row.place for row in again.first] == [row.place for row in once.first]
    assert again.counts.left_out["dropped: over 64 tokens"] > 0
    assert len(again.first) == prepare.FIRST or len(again.rows) < prepare.FIRST


def test_a_cache_that_may_only_be_read_is_read(
    load, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """As one that is part of an image: its times stay as they are."""
    once = load()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert load().rows[:] == once.rows[:]
    assert "prepared before" in (said := capfd.readouterr().err) and "damaged" not in said


@pytest.mark.parametrize(
    "override",
    [
        "data.format=prompt_completion",
        "data.columns={prompt: completion, completion: prompt}",
        "data.train_on=all",
        "data.on_long_row=truncate",
        "data.on_bad_row=skip",
        "data.max_rows=5",
        "training.max_length=64",
    ],
)
def test_every_option_makes_another_entry(load, override: str) -> None:
    load()
    load(override)
    assert len(entries()) == 2


def test_every_option_that_decides_is_covered() -> None:
    covered = {
        mark.partition("=")[0].partition(".")[2]
        for mark in test_every_option_makes_another_entry.pytestmark[0].args[1]
    }
    of_other_tasks = {key for task in TASKS for key in task.own_keys}  # in their own tests
    assert covered == {*cache.OPTIONS, "max_length"} - of_other_tasks


def test_content_counts_and_not_time(load, tmp_path: Path) -> None:
    first = load()
    path, was = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").stat()
    os.utime(path, (1, 1))
    load()
    assert len(entries()) == 1
    path.write_text(path.read_text().replace('ask 1"', 'ask 9"'))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert path.stat().st_size == was.st_size
    second = load()
    assert len(entries()) == 2
    assert second.rows[0] != first.rows[0]
    assert second.fingerprint != first.fingerprint


def test_a_changed_template_or_tokenizer_never_gets_old_tokens(
    load, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = load().rows["input_ids"]
    own = tokenizer.chat_template
    tokenizer.chat_template = own.replace("message['content']", "message['content'] + '!'")
    assert tokenizer.chat_template != own
    assert load().rows["input_ids"] != before
    tokenizer.chat_template = own
    tokenizer.add_tokens([AddedToken("answer", normalized=False)])
    assert load().rows["input_ids"] != before
    assert len(entries()) == 3


def test_a_date_in_the_template_is_the_run_s(
    load, tokenizer: PreTrainedTokenizerBase, capfd
) -> None:
    days = [date(2024, 7, 26), date(2026, 1, 2)]
    load(day=days[0])
    load(day=days[1])
    assert len(entries()) == 1
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    rows = [load(day=day).rows["input_ids"] for day in days]
    assert len(entries()) == 3
    assert [tokenizer.decode(ids[0])[:11] for ids in rows] == ["26 Jul 2024", "02 Jan 2026"]
    assert "writes the date into every conversation: 2024-07-26" in capfd.readouterr().err


@pytest.mark.parametrize("name", [cache.ROWS, cache.COUNTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_entry_is_made_anew(load, capfd, name: str, damage: str) -> None:
    once = load().rows[:]
    file = entries()[0] / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    assert load().rows[:] == once
    assert "are damaged" in capfd.readouterr().err
    assert file.read_bytes() == content


def test_a_flipped_bit_is_noticed(load, capfd) -> None:
    once = load().rows[:]
    file = entries()[0] / cache.ROWS
    content = bytearray(file.read_bytes())
    place = content.rindex(np.array(once["input_ids"][-1], np.int32).tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert load().rows[:] == once
    assert "they differ from what was written" in capfd.readouterr().err


def test_offsets_outside_the_buffers_are_noticed_before_anything_is_read(load, capfd) -> None:
    load()
    [entry] = cache.find_folder().iterdir()
    numbers = pyarrow.list_(pyarrow.int32())
    column = pyarrow.array([[1, 2, 3]], numbers)
    schema = pyarrow.schema(dict.fromkeys(("input_ids", "labels"), numbers))
    with pyarrow.ipc.new_stream(str(entry / cache.ROWS), schema) as writer:
        writer.write_batch(pyarrow.record_batch([column, column], schema=schema))
    written = (entry / cache.ROWS).read_bytes()
    inside, outside = (np.array([0, end], np.int32).tobytes() for end in (3, 2**30))
    assert inside in written
    (entry / cache.ROWS).write_bytes(written.replace(inside, outside))
    kept = json.loads((entry / cache.COUNTS).read_text())
    kept["counts"]["kept"], kept["places"] = 1, []
    (entry / cache.COUNTS).write_text(json.dumps(kept))
    assert len(load().rows) == len(ROWS)
    assert "offset" in capfd.readouterr().err
    assert entry.parent.stat().st_mode & 0o77 == 0


def test_another_user_s_entry_is_not_taken(load, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(os, "getuid", iter([12345, os.getuid()]).__next__)
    load()
    assert "they are another user's" in capfd.readouterr().err


def test_a_file_in_the_place_of_an_entry_is_replaced(load) -> None:
    once = load().rows[:]
    entry = entries()[0]
    shutil.rmtree(entry)
    entry.write_text("x")
    assert load().rows[:] == once


def test_several_may_prepare_at_once(load) -> None:
    limits = [40, 50, 60, 70] * 6
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda limit: len(load(f"training.max_length={limit}").rows), limits))
    assert made == [len(load(f"training.max_length={limit}").rows) for limit in limits]
    assert len(entries()) == 4


def test_a_folder_that_cannot_be_is_named(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", "/dev/null/x")
    with pytest.raises(
        LoraError, match="prepared rows cannot be kept in /dev/null/x/lora-cli/rows"
    ):
        load()


def test_what_fails_leaves_no_entry(load, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(LoraError, match="rows.jsonl:31: column 2: invalid JSON"):
        load()
    assert entries() == []


def test_what_is_not_used_goes(load) -> None:
    load()
    load("data.train_on=all")
    old = entries()
    for entry in old:
        os.utime(entry / cache.COUNTS, (time.time() - 31 * 24 * 3600,) * 2)
    load()  # used again
    load("training.max_length=64")
    assert len(set(entries()) & set(old)) == 1
    assert len(entries()) == 2
