"""Bad data sets and the one message each gets: file, line, what is wrong, what to do. Compared with
bad_data.txt.

Hermetic: files in a temporary folder. Alone: pytest tests/data/test_bad_data.py. After a change of
a message: python -m tests.data.test_bad_data > tests/data/bad_data.txt
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.common import ui
from lora_cli.common.errors import LoraError
from lora_cli.data import load
from lora_cli.recipe.load import load_recipe
from tests import snapshots

SNAPSHOT = Path(__file__).parent / "bad_data.txt"
GOOD = '{"prompt": "ask", "completion": "answer"}\n'


def turns(*messages: dict) -> str:
    return json.dumps({"messages": list(messages)}) + "\n"


def table(**columns: list) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def outside() -> bytes:
    """An Arrow stream in which the end of a text is put far behind the file's: reading it as it
    stands crashes."""
    stream, rows = io.BytesIO(), pyarrow.table({"prompt": ["ask"], "completion": ["answer" * 707]})
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)
    before, after = struct.pack("<ii", 0, len("answer") * 707), struct.pack("<ii", 0, 2**30)
    head, found, tail = stream.getvalue().rpartition(before)
    assert found
    return head + after + tail


USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
CALL = {"role": "assistant"}
# name -> (file's name, its content, more of the recipe's data section)
BAD: dict[str, tuple[str, str | bytes | None, str]] = {
    "no such file": ("rows.jsonl", None, ""),
    "no file matches": ("rows.jsonl", GOOD, "path: DIR/*.parquet"),
    "empty file": ("rows.jsonl", "", ""),
    "only blank lines": ("rows.jsonl", "\n\n\n", ""),
    "unknown kind of file": ("rows.xlsx", "x", ""),
    "one of several missing": ("rows.jsonl", GOOD, "path: [DIR/rows.jsonl, DIR/more.jsonl]"),
    "invalid JSON": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": }\n', ""),
    "cut off": ("rows.jsonl", GOOD + '{"prompt": "ask", "comp', ""),
    "single quotes": ("rows.jsonl", "{'prompt': 'ask', 'completion': 'answer'}\n", ""),
    "rows by their names": ("rows.json", '{"a": ' + GOOD.strip() + ', "b": ' + GOOD.strip() + "}", ""),
    "several lists": ("rows.json", '{"train": [' + GOOD.strip() + '], "test": [' + GOOD.strip() + "]}", ""),
    "a key twice": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": "a", "completion": "b"}\n', ""),
    "a comma after the row": ("rows.jsonl", GOOD.strip() + ",\n" + GOOD, ""),
    "a comment": ("rows.jsonl", "# mine\n" + GOOD, ""),
    "a comma too many": ("rows.json", "[" + GOOD.strip() + ",]", ""),
    "a pointer of Git LFS": ("rows.jsonl", "version https://git-lfs.github.com/spec/v1\n", ""),
    "a web page": ("rows.jsonl", "<!DOCTYPE html>\n", ""),
    "broken list": ("rows.json", '[{"prompt": "ask"},\n {"prompt": ]', ""),
    "list of texts": ("rows.json", '["ask", "answer"]', ""),
    "a row is a list": ("rows.jsonl", GOOD + '["ask", "answer"]\n', ""),
    "a row is a number": ("rows.jsonl", GOOD + "17\n", ""),
    "another encoding": ("rows.jsonl", '{"prompt": "é", "completion": "ü"}\n'.encode("latin-1"), ""),
    "no gzip": ("rows.jsonl.gz", GOOD, ""),
    "half a gzip": ("rows.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-20], ""),
    "no parquet": ("rows.parquet", GOOD, ""),
    "parquet without the columns": ("rows.parquet", table(question=["ask"], reply=["answer"]), ""),
    "null in parquet": ("rows.parquet", table(prompt=["ask", "ask"], completion=["answer", None]), ""),
    "CSV with too few columns": ("rows.csv", "prompt,completion\nask,answer\nask\n", ""),
    "CSV with an open quote": ("rows.csv", 'prompt,completion\nask,"answer\n', ""),
    "CSV without the columns": ("rows.csv", "question;reply\nask;answer\n", ""),
    "unknown columns": ("rows.jsonl", '{"foo": "ask", "bar": "answer"}\n', ""),
    "column misspelt": ("rows.jsonl", '{"prompt": "ask", "completoin": "answer"}\n', "format: prompt_completion"),
    "named column is not there": ("rows.jsonl", GOOD, "columns: {prompt: question}"),
    "a later row lacks a column": ("rows.jsonl", GOOD + '{"prompt": "ask"}\n', ""),
    "null": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": null}\n', ""),
    "a number": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": 42}\n', ""),
    "true": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": true}\n', ""),
    "a mapping": ("rows.jsonl", GOOD + '{"prompt": {"text": "ask"}, "completion": "answer"}\n', ""),
    "empty answer": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": "  "}\n', ""),
    "empty question": ("rows.jsonl", GOOD + '{"prompt": "", "completion": "answer"}\n', ""),
    "several kinds": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": null}\n' * 3 + "{\n" + "17\n" * 2, ""),
    "messages are text": ("rows.jsonl", '{"messages": "ask"}\n', ""),
    "no messages": ("rows.jsonl", '{"messages": []}\n', ""),
    "a message is text": ("rows.jsonl", '{"messages": ["ask"]}\n', ""),
    "unknown role": ("rows.jsonl", turns(USER, {"role": "asistant", "content": "answer"}), ""),
    "no role": ("rows.jsonl", turns(USER, {"content": "answer"}), ""),
    "no assistant": ("rows.jsonl", turns(USER), ""),
    "assistant first": ("rows.jsonl", turns(ANSWER, USER), ""),
    "content is null": ("rows.jsonl", turns(USER, {"role": "assistant", "content": None}), ""),
    "content in parts": ("rows.jsonl", turns(USER | {"content": [{"type": "text", "text": "ask"}, {"type": "image_url"}]}, ANSWER), ""),
    "pictures beside the text": (
        "rows.jsonl", turns(USER, ANSWER)[:-2] + ', "images": ["a.png"]}\n', ""),
    "a picture in the text": (
        "rows.jsonl", '{"prompt": "<image> ask", "completion": "answer", "image": "a.png"}\n', ""),
    "empty turn": ("rows.jsonl", turns(USER, {"role": "assistant", "content": ""}), ""),
    "train is text": ("rows.jsonl", turns(USER, ANSWER | {"train": "no"}), ""),
    "nothing to train": ("rows.jsonl", turns(USER, ANSWER | {"train": False}), ""),
    "broken tool call": ("rows.jsonl", turns(USER, CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}), ""),
    "tool calls are text": ("rows.jsonl", turns(USER, CALL | {"tool_calls": "f()"}), ""),
    "unknown speaker": ("rows.jsonl", '{"conversations": [{"from": "bot", "value": "x"}]}\n', ""),
    "no speaker": ("rows.jsonl", '{"conversations": [{"value": "x"}]}\n', ""),
    "function_call is no JSON": (
        "rows.jsonl", '{"conversations": [{"from": "function_call", "value": "f"}]}\n', ""),
    "the template refuses": ("rows.jsonl", turns({"role": "system", "content": "be brief"}, USER, ANSWER), ""),
    "token out of range": ("rows.jsonl", '{"input_ids": [1, 2, 99]}\n', ""),
    "tokens are text": ("rows.jsonl", '{"input_ids": ["1"]}\n', ""),
    "labels too few": ("rows.jsonl", '{"input_ids": [1, 2], "labels": [1]}\n', ""),
    "labels of another text": ("rows.jsonl", '{"input_ids": [1, 2], "labels": [-100, 3]}\n', ""),
    "too long": ("rows.jsonl", '{"prompt": "ask", "completion": "' + "answer " * 50 + '"}\n', "on_long_row: error"),
    "all too long": ("rows.jsonl", '{"prompt": "ask", "completion": "' + "answer " * 50 + '"}\n', ""),
    "no such split": ("rows.jsonl", GOOD, "split: test"),
    "an empty slice": ("rows.jsonl", GOOD, "'split': 'train[5:]'"),
    "skipped": ("rows.jsonl", GOOD + '{"prompt": "ask", "completion": null}\n' * 2 + "{\n", "on_bad_row: skip"),
    "half a character": ("rows.jsonl", GOOD + '{"prompt": "a\\ud800", "completion": "answer"}\n', ""),
    "thousands of digits": ("rows.jsonl", GOOD + '{"prompt": ' + "9" * 5000 + "}\n", ""),
    "thousands of brackets": ("rows.jsonl", GOOD + "[" * 200_000 + "\n", ""),
    "damaged gzip": (
        "rows.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:30] + b"\xff" * 60, ""),
    "another encoding in half a gzip": (
        "rows.jsonl.gz", gzip.compress(b"\xff" + random.Random(0).randbytes(50_000).hex().encode())[:-30], ""),
    "arrow whose texts lie outside the file": ("rows.arrow", outside(), ""),
    "no turns": ("rows.jsonl", '{"prompt": [], "completion": []}\n', ""),
    "no slice": ("rows.jsonl", GOOD, "'split': 'train[foo]'"),
    "CSV without names": ("rows.csv", "What is it?,an answer\nask,answer\n", ""),
    "one unknown column": ("rows.jsonl", '{"Was ist das?": "ask"}\n', ""),
    "the answer first": ("rows.jsonl", '{"answer": "ask", "asked": "answer"}\n', ""),
    "a column twice": ("rows.csv", "prompt,completion,completion\nask,answer,other\n", ""),
    "a misspelt file in a list": ("rows.jsonl", GOOD, "path: [DIR/rows.jsonl, DIR/rows.jsnl]"),
    "preferences": ("rows.jsonl", '{"prompt": "ask", "chosen": "answer", "rejected": "user"}\n', ""),
    "UTF-16": ("rows.jsonl", GOOD.encode("utf-16"), ""),
    "a mask too short": ("rows.jsonl", '{"input_ids": [1, 2], "completion_mask": [1]}\n', ""),
    "all skipped": ("rows.jsonl", '{"prompt": "ask", "completion": null}\n', "on_bad_row: skip"),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Words; its template knows no system."""
    words = {
        word: number
        for number, word in enumerate(["</s>", "<unk>", "user", "assistant", "ask", "answer", ":"])
    }
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system "
        "role') }}{% endif %}"
        "{{ m['role'] + ' : ' + m['content'] + ' ' + eos_token + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return made


def said(name: str, folder: Path) -> str:
    """What the data set's reader gets to see: warnings, and the error with its hint."""
    file, content, section = BAD[name]
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = "" if section.startswith("path:") else f"path: DIR/{file}, "
    recipe = folder / "r.yaml"
    text = f"model: {{name_or_path: x}}\ndata: {{{path}{section}}}\ntraining: {{max_length: 30}}\n"
    recipe.write_text(text.replace("DIR", str(folder)))
    heard: list[str] = []
    say, ui.say = ui.say, lambda *lines: heard.extend(lines)
    try:
        load.load_rows(load_recipe(recipe), tokenizer())
    except LoraError as error:
        heard.append("\n".join(filter(None, ui.list_lines(error))))
    finally:
        ui.say = say
    heard = [line for line in heard if not line.startswith("  ")]  # what is read, and how
    return "\n".join(heard).replace(f"{folder}/", "").replace(str(folder), ".")


def test_the_snapshot_covers_every_data_set() -> None:
    assert len(BAD) >= 75
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_a_bad_data_set(name: str, tmp_path: Path) -> None:
    found = said(name, tmp_path)
    assert found == snapshots.find(SNAPSHOT, name)
    assert found.startswith(("error: ", "warning: "))
    assert len(found.splitlines()) <= 3


if __name__ == "__main__":
    os.environ["LORA_CACHE_DIR"] = tempfile.mkdtemp()
    sys.stdout.write(snapshots.render(BAD, said))
