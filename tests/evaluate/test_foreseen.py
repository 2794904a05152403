"""Answers that one pass shows to be the expected ones are those that writing gives, in every form of
a model; nothing is foreseen where a greedy answer is not the likeliest token each time.

Hermetic: an adapter on the tiny model, and rows whose expected answers are its own. Alone: pytest
tests/evaluate/test_foreseen.py
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from gguf.scripts import gguf_new_metadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.evaluate import foreseen, held_out, score, token_losses
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.gguf_answerer import GGUFAnswerer
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.evaluate.score import Request
from lora_cli.gguf import tools
from lora_cli.merge import merge
from lora_cli.recipe import load
from lora_cli.train import run

ROWS = 24
ROOM = 40


class Made(NamedTuple):
    """A model in three forms, and rows that it answers as expected where it ends its answers."""

    forms: dict[str, Path]
    data: Path


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("foreseen")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 400}}\n"
        "training: {max_steps: 150, per_device_train_batch_size: 8, learning_rate: 2e-3, "
        "max_length: 128, save_strategy: 'no'}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    run.train(load.load_recipe(recipe, []))
    adapter, merged, gguf = folder / "run" / "adapter", folder / "merged", folder / "tiny.gguf"
    merge.merge(adapter, merged)
    tools.convert(merged, gguf, "f32", tools.find_converter())
    rows = [json.loads(line) for line in (tiny / "eval.jsonl").read_text().splitlines()[:ROWS]]
    data = folder / "rows.jsonl"
    write_rows(data, rows)
    for row, said in zip(rows, score_rows(adapter, data, folder / "own"), strict=True):
        if said["ended"]:
            row["completion"] = said["answer"]
    write_rows(data, rows)
    yield Made({"adapter": adapter, "merged": merged, "gguf": gguf}, data)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def score_rows(
    form: Path, data: Path, out: Path, *beside: Path, **given: Any
) -> list[dict[str, Any]]:
    """The lines of answers.jsonl of one form."""
    asked = Request(
        str(data),
        ["loss", "exact"],
        out=out,
        adds_base=False,
        sampling=Sampling(ROOM, 0.0),
        general=False,
    )
    score.evaluate([str(form), *map(str, beside)], asked._replace(**given))
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    label = lines[0]["model"]
    return [line for line in lines if line["model"] == label]


@pytest.mark.parametrize("form", ["adapter", "merged", "gguf"])
def test_what_is_foreseen_is_what_is_written(
    made: Made, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A GGUF file is read by the tokenizer of the model beside it."""
    beside = [made.forms["merged"]] if form == "gguf" else []
    given = made.forms[form], made.data
    fast = score_rows(*given, tmp_path / "fast", *beside)
    monkeypatch.setattr(foreseen, "MARGIN", math.inf)
    slow = score_rows(*given, tmp_path / "slow", *beside)
    number = sum(line.get("foreseen", False) for line in fast)
    assert number >= ROWS // 4
    said = f"{number} of {ROWS} answers are the expected ones, by one pass over each"
    assert said in capsys.readouterr().err
    assert not any(line["foreseen"] for line in slow)
    for one, other in zip(fast, slow, strict=True):
        assert one | {"foreseen": None} == other | {"foreseen": None}


def test_what_is_not_likeliest_or_not_clearly_is_written(made: Made, tmp_path: Path) -> None:
    """By hand: the margins that plain transformers gives."""
    answerer = open_models([str(made.forms["merged"])])[str(made.forms["merged"])]
    network, tokenizer = answerer.network, answerer.tokenizer  # type: ignore[attr-defined]
    lines = score_rows(made.forms["merged"], made.data, tmp_path / "out")
    rows = [json.loads(line) for line in made.data.read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        asked = [{"role": "user", "content": row["prompt"]}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
        text = f"{before}{row['completion']}{tokenizer.eos_token}"
        whole = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = network(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].double()
        own = logits.gather(1, whole[0, ids.shape[1] :, None])
        best = logits.topk(2).values
        margin = (own[:, 0] - best[:, 0]).min() if (own[:, 0] < best[:, 0]).any() else None
        clear = margin is None and float((best[:, 0] - best[:, 1]).min()) >= foreseen.MARGIN
        assert line["foreseen"] is bool(clear), row
    assert any(line["foreseen"] for line in lines)


def test_a_long_answer_is_cut_as_written(made: Made, tmp_path: Path) -> None:
    lines = score_rows(made.forms["merged"], made.data, tmp_path, sampling=Sampling(3, 0.0))
    assert not any(line["foreseen"] or line["ended"] for line in lines)


def test_a_penalty_is_heeded(made: Made, tmp_path: Path) -> None:
    """The model's own settings ask for one: greedy answers are then not the likeliest tokens."""
    model = shutil.copytree(made.forms["merged"], tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 3.0}))
    plain = score_rows(made.forms["merged"], made.data, tmp_path / "plain")
    lines = score_rows(model, made.data, tmp_path / "out")
    assert not any("foreseen" in line for line in lines)
    changed = [one["answer"] != other["answer"] for one, other in zip(plain, lines, strict=True)]
    assert sum(changed) > ROWS // 2


def test_a_penalty_that_a_gguf_file_brings_is_heeded(made: Made, tmp_path: Path) -> None:
    opened = GGUFAnswerer(made.forms["gguf"])
    assert opened.takes_likeliest
    opened.model.close()
    reader, file = gguf.GGUFReader(made.forms["gguf"]), tmp_path / "penalty.gguf"
    writer = gguf.GGUFWriter(file, "llama", endianess=reader.endianess)
    key = "general.sampling.penalty_repeat"
    asked = {key: gguf_new_metadata.MetadataDetails(gguf.GGUFValueType.FLOAT32, 3.0)}
    gguf_new_metadata.copy_with_new_metadata(reader, writer, asked, [])
    opened = GGUFAnswerer(file)
    assert not opened.takes_likeliest
    opened.model.close()


def test_a_token_that_llama_cpp_leaves_out_of_answers_is_not_foreseen(
    made: Made, tmp_path: Path
) -> None:
    """An added token that is a word for transformers and a control token in the file, as llama.cpp's
    converter makes one of `<|yes|>` in many vocabularies."""
    tokenizer = AutoTokenizer.from_pretrained(made.forms["merged"])
    network = AutoModelForCausalLM.from_pretrained(made.forms["merged"])
    tokenizer.add_tokens(["<|yes|>"])
    network.resize_token_embeddings(len(tokenizer))
    folder, file = tmp_path / "model", tmp_path / "tiny.gguf"
    for each in (tokenizer, network):
        each.save_pretrained(folder)
    tools.convert(folder, file, "f32", tools.find_converter())
    token, kinds = tokenizer.convert_tokens_to_ids("<|yes|>"), gguf.GGUFReader(file, "r+")
    field = kinds.fields["tokenizer.ggml.token_type"]
    field.parts[field.data[token]][0] = gguf.TokenType.CONTROL
    del field, kinds
    row = json.loads(made.data.read_text().splitlines()[0])
    write_rows(tmp_path / "rows.jsonl", [row, row | {"completion": "<|yes|> it is"}])
    held = held_out.read_held_out(str(tmp_path / "rows.jsonl"), {}, {}, None)
    encoded = token_losses.encode_rows(tokenizer, "assistant", held.rows)
    marked = {}
    for path in (folder, file):
        answerer = open_models([str(path)])[str(path)]
        with token_losses.open_reading(answerer, path, 200) as reading:
            guesses = foreseen.Guesses(answerer, reading, Sampling(ROOM, 0.0))
            pieces = [guesses.mark(*each)[-1] for each in zip(held.rows, encoded, strict=True)]
        marked[path] = [len(piece.answer) > 0 for piece in pieces]
    assert marked == {folder: [True, True], file: [True, False]}
    assert answerer.model.detokenize([token]) == "<|yes|>"  # an answer has it not
    answerer.model.close()


def test_a_foreseen_answer_is_read_with_the_token_that_ends_it(made: Made, monkeypatch) -> None:
    """As written ones are: an end that is no special token is in the text of both."""
    path, given = made.forms["merged"], []
    answerer = open_models([str(path)])[str(path)]
    monkeypatch.setattr(answerer, "read", lambda ids: given.append(ids) or "")
    held = held_out.read_held_out(str(made.data), {}, {}, 1)
    [pieces] = token_losses.encode_rows(answerer.tokenizer, "assistant", held.rows)
    with token_losses.open_reading(answerer, path, 200) as reading:
        guesses = foreseen.Guesses(answerer, reading, Sampling(ROOM, 0.0))
        [piece] = guesses.mark(held.rows[0], pieces)
        guesses.tell(piece, token_losses.Seen(token_losses.Loss(0.0, 1), math.inf))
        ends = [reading.ends_answer(token) for token in given[0]]
    assert ends == [False] * (len(ends) - 1) + [True]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_a_text_s_length_moves_leave_nothing_foreseen(
    made: Made, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, a text is shorter when its first tokens are computed."""
    answerer = open_models([str(made.forms["merged"])])[str(made.forms["merged"])]
    assert answerer.takes_likeliest
    config = answerer.network.config
    monkeypatch.setitem(config.rope_parameters, "rope_type", kind)
    assert not answerer.takes_likeliest


def test_a_drawn_answer_is_drawn(made: Made, tmp_path: Path) -> None:
    lines = score_rows(made.forms["merged"], made.data, tmp_path, sampling=Sampling(ROOM, 0.7))
    assert not any("foreseen" in line for line in lines)
