"""`lora generate --file` reads what `lora train` reads: one row, one question, whatever the file;
a DoRA's norms are computed once an answer; each prompt has one text, whatever a model's settings.

Hermetic: small files, the tiny model. Alone: pytest tests/evaluate/test_generate.py
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from pyarrow import parquet

from lora_cli.common.errors import LoraError
from lora_cli.evaluate import answerers, open_answerers
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.generate import generate, read_questions
from lora_cli.models import answering
from lora_cli.recipe import load
from lora_cli.serve.pieces import Drawing
from lora_cli.serve.torch_engine import TorchEngine
from lora_cli.speed import dora_norms
from lora_cli.train import run
from tests.evaluate import odd_settings

ROWS = [
    {"prompt": "Name a river,\nplease.", "completion": "The Elbe."},
    {"prompt": "And another?", "completion": ""},
]


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, ROWS[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITERS: dict[str, Callable[[Path], object]] = {
    "q.jsonl": lambda path: path.write_text(LINES),
    "q.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "q.csv": lambda path: write_table(path, ","),
    "q.tsv": lambda path: write_table(path, "\t"),
    "q.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "q.arrow": write_arrow,
    "q.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_questions(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    questions = read_questions(["Hi."], tmp_path / name)
    assert [question.text for question in questions] == ["Hi.", *(row["prompt"] for row in ROWS)]
    assert [question.expected for question in questions] == [None, "The Elbe.", None]


def test_a_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    for name, write in (
        ("q.txt", Path.write_bytes),
        ("q.txt.gz", lambda p, d: p.write_bytes(gzip.compress(d))),
    ):
        write(tmp_path / name, b"One, two?\r\n\n  Three? \n")
        questions = read_questions([], tmp_path / name)
        assert [question.text for question in questions] == ["One, two?", "  Three? "]
        assert [question.place for question in questions] == [
            f"{tmp_path / name}:{n}" for n in (1, 3)
        ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n', ":2: a row needs prompt, instruction"),
        ("q.jsonl", '{"prompt": "a", "completion": 7}\n', ":1: completion is a number (7)"),
        ("q.json", '[{"prompt": "a"}, 3]', ", row 2: the row is 3, not a mapping of columns"),
        ("q.csv", "prompt\na\nb,c\n", ":3: 2 columns, but the header has 1"),
        (
            "q.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            ":1: the assistant has no turn",
        ),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_place(
    name: str, content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraError) as caught:
        read_questions([], tmp_path / name)
    assert caught.value.message.startswith(f"{tmp_path / name}{said}")
    assert "--set" not in str(caught.value.hint)


def test_tools_that_a_model_is_not_shown_are_told(tiny: Path, tmp_path: Path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "sun"}]
    tool = {"type": "function", "function": {"name": "f"}}
    given = [{"messages": turns, "tools": [tool]}, {"messages": turns}]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    model = str(tiny / "model")
    generate([model], [], rows, 2, 0.0, None, None, False)
    said = f"{model}: 1 prompt has tools, which its chat template does not read: they are left out"
    assert said in capsys.readouterr().err


def test_an_answer_of_a_dora_computes_its_norms_once(
    write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = run.train(load.load_recipe(write_recipe("method: dora\n")))
    (answerer,) = open_answerers.open_models([str(adapter)]).values()
    asked, sampling = [answerers.Asked([{"role": "user", "content": "red"}])], Sampling(4, 0.0)
    model = answerer.bases.loaded[answerer.key]
    layers = dora_norms.find_layers(model)
    counted: list[object] = []
    compute = dora_norms.FactoredDora.compute_norms

    def count(self: dora_norms.FactoredDora, *given: torch.Tensor) -> torch.Tensor:
        counted.append(self)
        return compute(self, *given)

    monkeypatch.setattr(dora_norms.FactoredDora, "compute_norms", count)
    answer = answerer.answer(asked, sampling)
    assert len(counted) == len(layers) == 14
    for layer in layers:
        layer.__class__ = DoraLinearLayer  # PEFT's own
    assert answerer.answer(asked, sampling) == answer


ASKED = [answerers.Asked([{"role": "user", "content": text}]) for text in ("Sort: zoo cat", "sky")]


@pytest.mark.parametrize("name", ["num_beams", "all"])
def test_settings_of_the_model_leave_one_text_for_each_prompt(
    name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Of several beams or texts, those of the first prompt stood in the second's place."""
    [answerer] = open_answerers.open_models([str(tiny / "model")]).values()
    settings, sampling = answerer.network.generation_config, Sampling(8, 0.0)
    answerer.tokenizer.chat_template = "{{ messages[0].content }}"
    answerer.tokenizer.pad_token = answerer.tokenizer.eos_token = None
    monkeypatch.setattr(settings, "min_new_tokens", 6)  # for beams to have something to choose
    expected = answerer.answer(ASKED, sampling)
    prompt = str(ASKED[0].messages[0]["content"])
    sampled = answering.write_answer(answerer.network, answerer.tokenizer, prompt, 8, [])
    for key, value in odd_settings.ODD.items():
        if name in (key, "all"):
            monkeypatch.setattr(settings, key, value)
    assert answerer.answer(ASKED, sampling) == expected
    assert answerer.stream(ASKED[0], sampling) == capsys.readouterr().out.rstrip("\n") == sampled
    engine, drawing = TorchEngine({"m": answerer}), Drawing(8, 0.0)
    end = engine.write("m", answerer.encode(ASKED[0]), drawing, lambda piece: None, lambda: True)
    assert end.text == expected[0] == sampled
