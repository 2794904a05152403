"""`lora evaluate`: losses are those of plain transformers and of training itself, batches do not
matter, a killed evaluation ends with the same files, and odd rows are each told once.

Hermetic: the tiny model, an adapter trained here, merged, and converted for llama.cpp. Alone: pytest
tests/evaluate/test_score.py
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
import torch
from peft import PeftModel
from pyarrow import parquet
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.evaluate import input_rows, score, scored_models, token_losses
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.forgetting import read_passages
from lora_cli.evaluate.hf_answerers import HFAnswerer
from lora_cli.evaluate.score import Request
from lora_cli.gguf import tools
from lora_cli.merge import merge
from lora_cli.models import decoder
from lora_cli.recipe import load, name_objective
from lora_cli.train import run
from tests.conftest import ROOT

ROWS = 12


class Made(NamedTuple):
    """An adapter, merged and as a GGUF, with rows that it was not trained on."""

    base: Path
    adapter: Path
    merged: Path
    gguf: Path
    data: Path
    eval_loss: float
    """What training said of these rows."""


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("score")
    data = folder / "held out.jsonl"
    rows = (tiny / "eval.jsonl").read_text().splitlines()[:ROWS]
    data.write_text("".join(f"{row}\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 200, eval_path: {data}}}\n"
        "training: {max_steps: 20, per_device_train_batch_size: 8, learning_rate: 2e-3, "
        "max_length: 128, save_strategy: 'no', eval_strategy: steps, eval_steps: 20}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    run.train(load.load_recipe(recipe, []))
    adapter = folder / "run" / "adapter"
    merge.merge(adapter, folder / "merged")
    gguf = folder / "tiny.gguf"
    tools.convert(folder / "merged", gguf, "f32", tools.find_converter())
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    [eval_loss] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    yield Made(tiny / "model", adapter, folder / "merged", gguf, data, eval_loss)


def evaluate(paths: list[Path], out: Path, **given: Any) -> dict[str, Any]:
    """What `lora evaluate` writes."""
    request = Request(given.pop("data", None), out=out, sampling=Sampling(12, 0.0))._replace(
        **given
    )
    score.evaluate([str(path) for path in paths], request)
    return json.loads((out / "evaluation.json").read_text())


def read_answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of all forms."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate([made.adapter, made.merged, made.gguf], out, data=str(made.data))
    return out


def sum_plainly(network: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    """Cross entropy over an answer's tokens by transformers alone."""
    asked = [{"role": "user", "content": row["prompt"]}]
    told = [*asked, {"role": "assistant", "content": row["completion"]}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(told, tokenize=False)
    assert text.startswith(before)
    skipped = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    trained = len(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = network(input_ids=ids).logits[0].double()
    losses = functional.cross_entropy(
        logits[skipped - 1 : trained - 1], ids[0, skipped:trained], reduction="sum"
    )
    return float(losses), trained - skipped


def test_losses_are_plain_transformers_and_training_s_own(made: Made, whole: Path) -> None:
    evaluation = json.loads((whole / "evaluation.json").read_text())
    found = {each["kind"]: each["metrics"]["loss"] for each in evaluation["models"]}
    tokenizer = AutoTokenizer.from_pretrained(made.adapter)
    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(made.merged, dtype=torch.float32).eval()
    networks = {"base": base, "merged": merged}
    rows = [json.loads(line) for line in made.data.read_text().splitlines()]
    wanted = {}
    for kind, network in networks.items():
        sums = [sum_plainly(network, tokenizer, row) for row in rows]
        wanted[kind] = sum(each for each, _ in sums) / sum(tokens for _, tokens in sums)
    adapted = PeftModel.from_pretrained(base, made.adapter).eval()
    sums = [sum_plainly(adapted, tokenizer, row) for row in rows]
    wanted["adapter"] = sum(each for each, _ in sums) / sum(tokens for _, tokens in sums)
    for kind, loss in wanted.items():
        assert found[kind]["value"] == pytest.approx(loss, abs=1e-5)
        assert found[kind]["tokens"] == sum(tokens for _, tokens in sums)
        assert found[kind]["low"] < loss < found[kind]["high"]
    assert found["adapter"]["value"] == pytest.approx(made.eval_loss, abs=1e-5)
    assert found["gguf"]["value"] == pytest.approx(found["merged"]["value"], abs=1e-3)
    assert wanted["base"] - wanted["adapter"] > 1, "the adapter changes nothing"


def test_what_is_written(made: Made, whole: Path) -> None:
    evaluation, lines = json.loads((whole / "evaluation.json").read_text()), read_answers(whole)
    assert [each["label"] for each in evaluation["models"]][:1] == ["base"]
    assert evaluation["data"]["name"] == "held out.jsonl"
    assert str(made.data.parent) not in json.dumps([evaluation["data"], lines[0]["place"]])
    assert len(lines) == 4 * ROWS
    assert set(lines[0]) >= {"row", "place", "model", "prompt", "expected", "answer", "scores"}
    assert lines[0]["place"] == "held out.jsonl:1"
    for model in evaluation["models"]:
        own = [line for line in lines if line["model"] == model["label"]]
        right = [line["answer"].strip() == line["expected"].strip() for line in own]
        assert model["metrics"]["exact"]["value"] == pytest.approx(sum(right) / ROWS)
        assert model["metrics"]["perplexity"]["value"] == pytest.approx(
            math.exp(model["metrics"]["loss"]["value"])
        )
    said = {
        row: {line["answer"].strip() for line in lines if line["row"] == row}
        for row in range(1, ROWS + 1)
    }
    assert evaluation["differing"] == sum(len(each) > 1 for each in said.values()) > 0
    by_form = {
        m: [line["answer"] for line in lines if line["model"] == m]
        for m in {ln["model"] for ln in lines}
    }
    others = [answers for label, answers in by_form.items() if label != "base"]
    assert all(answers == others[0] for answers in others), "adapter, merged and GGUF say the same"
    assert not list(whole.glob(".answers*"))


def test_a_base_is_without_its_adapter_also_after_it(
    made: Made, whole: Path, tmp_path: Path
) -> None:
    """They share weights, on which the adapter lies by then."""
    given = {"data": str(made.data), "metrics": ["loss", "exact"], "general": False}
    evaluate([made.adapter, made.base], tmp_path / "out", **given, adds_base=False)
    lines = read_answers(tmp_path / "out")
    own = [line for line in lines if line["model"] == "base"]
    wanted = [line for line in read_answers(whole) if line["model"] == "base"]
    assert len(lines) == 2 * ROWS
    assert [line["answer"] for line in own] == [line["answer"] for line in wanted]
    for one, other in zip(own, wanted):
        assert one["scores"]["loss"] == pytest.approx(other["scores"]["loss"], abs=1e-5)


def test_forgetting_is_the_loss_of_the_general_text(made: Made, whole: Path) -> None:
    evaluation = json.loads((whole / "evaluation.json").read_text())
    base, adapter, *others = [each["forgetting"] for each in evaluation["models"]]
    tokenizer = AutoTokenizer.from_pretrained(made.adapter)
    network = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for passage in read_passages():
        ids = tokenizer(passage, return_tensors="pt")["input_ids"][:, :512]
        with torch.no_grad():
            total += float(network(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert base["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert base["tokens"] == tokens
    assert base["difference"] is None
    assert adapter["difference"]["value"] == pytest.approx(adapter["loss"] - base["loss"])
    assert adapter["difference"]["low"] > 0, "twenty steps at 2e-3 make the tiny model forget"
    assert all(each["loss"] == pytest.approx(adapter["loss"], abs=1e-3) for each in others)


@pytest.mark.parametrize("size", [1, 5])
def test_batches_do_not_matter(made: Made, whole: Path, tmp_path: Path, size: int) -> None:
    evaluate([made.adapter], tmp_path / "out", data=str(made.data), batch_size=size)
    labels = {line["model"] for line in read_answers(tmp_path / "out")}
    ones = [line for line in read_answers(whole) if line["model"] in labels]
    others = read_answers(tmp_path / "out")
    assert len(ones) == len(others) == 2 * ROWS
    for one, other in zip(ones, others):
        assert one["answer"] == other["answer"]
        assert one["scores"]["loss"] == pytest.approx(other["scores"]["loss"], abs=1e-5)


def test_little_room_for_an_answer_is_each_row_s_own(
    made: Made, tmp_path: Path, monkeypatch
) -> None:
    """A model of few positions, which the longest prompt of a batch would take from all."""
    rows = [{"prompt": "Reverse: red fan" + " jet" * n, "completion": "x"} for n in range(6)]
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    lengths = [
        len(tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False))
        for each in asked
    ]
    monkeypatch.setattr(HFAnswerer, "positions", max(lengths) + 1)
    given = {
        "data": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "metrics": ["exact"],
        "general": False,
        "sampling": Sampling(30, 0.0),
    }
    for size in (1, 6):
        evaluate([made.merged], tmp_path / str(size), batch_size=size, **given)
    ones, others = read_answers(tmp_path / "1"), read_answers(tmp_path / "6")
    assert ones == others
    written = [
        len(tokenizer(line["answer"], add_special_tokens=False)["input_ids"]) for line in ones
    ]
    assert max(written) > 1, "the room that the longest row has"


KILLED = """
import os, signal, sys
from lora_cli.evaluate import kept_scores
add, calls = kept_scores.Kept.add, []
def add_and_die(self, records):
    calls.append(1)
    if len(calls) == int(sys.argv.pop()):
        self.file.open("a").write('[{"row": 3, "answer": "cut o')
        os.kill(os.getpid(), signal.SIGKILL)
    sys.argv.append(str(at))
    add(self, records)
at = int(sys.argv[-1])
kept_scores.Kept.add = add_and_die
from lora_cli.evaluate import score
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.hf_answerers import HFAnswerer
score.evaluate([sys.argv[1]], score.Request(
    sys.argv[2], out=__import__("pathlib").Path(sys.argv[3]), sampling=Sampling(12, 0.0),
    batch_size=3))
"""


@pytest.mark.parametrize("at", [2, 12])
def test_a_killed_evaluation_ends_with_the_same_files(
    made: Made, tmp_path: Path, at: int, capsys
) -> None:
    """Amid losses of the base, and amid what the adapter says."""
    given = {"data": str(made.data), "batch_size": 3}
    evaluate([made.adapter], tmp_path / "whole", **given)
    words = [sys.executable, "-c", KILLED, made.adapter, made.data, tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for calls in (at, 2):  # twice, so what the first one left half is written on
        command = [str(word) for word in (*words, calls)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert list((tmp_path / "out").glob(".answers*"))
    capsys.readouterr()
    found = evaluate([made.adapter], tmp_path / "out", **given)
    assert "goes on; " in capsys.readouterr().err
    wanted = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert found | {"started": ""} == wanted | {"started": ""}
    files = [tmp_path / name / "answers.jsonl" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "out").glob(".answers*"))


def test_what_is_finished_is_not_computed_again(
    made: Made, tmp_path: Path, monkeypatch, capsys
) -> None:
    out, opened = tmp_path / "out", []
    given = {"data": str(made.data), "general": False, "metrics": ["exact"]}
    before = evaluate([made.adapter], out, **given)
    own = scored_models.Shelf.open
    monkeypatch.setattr(
        scored_models.Shelf,
        "open",
        lambda self, each: (opened.append(each.label), own(self, each))[1],
    )
    again = evaluate([made.adapter], out, **given | {"metrics": ["exact", "f1"]})
    assert not opened
    assert again["models"][0]["metrics"]["exact"] == before["models"][0]["metrics"]["exact"]
    evaluate([made.adapter, made.merged], out, **given)
    assert (
        opened
        == [evaluate([made.merged], tmp_path / "m", **given)["models"][0]["label"]] * 1 + opened[1:]
    )
    opened.clear()
    evaluate([made.adapter, made.merged], out, **given, sampling=Sampling(3, 0.0))
    assert len(opened) == 3
    opened.clear()
    evaluate([made.adapter, made.merged], out, **given, sampling=Sampling(3, 0.0), fresh=True)
    assert len(opened) == 3
    # answers that somebody has changed are not taken for those that were computed
    opened.clear()
    text = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(text.replace('"exact": 0.0', '"exact": 1.0'))
    evaluate([made.adapter, made.merged], out, **given, sampling=Sampling(3, 0.0))
    assert len(opened) == 3
    assert "is not as it was written" in capsys.readouterr().err


def test_what_is_read_or_written_otherwise_is_computed_again(made: Made, tmp_path: Path) -> None:
    """In the folder of an evaluation of the same file and weights: rows under other names, those
    alone whose answer is wanted, and a model whose settings have changed."""
    base = tmp_path / "base"
    shutil.copytree(made.base, base)
    texts = ["Copy: sun", "Sort: zoo cat", "Reverse: red dog", "Copy: bus"]
    rows = [
        {"prompt": text, "completion": "sun", "question": text[::-1], "label": at > 1}
        for at, text in enumerate(texts)
    ]
    given = {
        "data": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "general": False, "metrics": ["exact"],
    }  # fmt: skip

    def ask(out: str) -> list[tuple[str, str]]:
        evaluate([base], tmp_path / out, **given)
        return [(each["prompt"], each["answer"]) for each in read_answers(tmp_path / out)]

    asked = ask("out")
    with pytest.MonkeyPatch.context() as patch:
        objective = name_objective("kto")
        patch.setattr(scored_models, "find_objective", lambda scored: objective)
        assert ask("out") == asked[2:]
    assert ask("out") == asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_models, "find_columns", lambda scored: {"prompt": "question"})
        assert [prompt for prompt, _ in ask("out")] == [text[::-1] for text in texts]
        assert ask("out") == ask("fresh") != asked
    assert ask("out") == asked
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"min_new_tokens": 9}))
    longer = ask("out")
    assert [len(answer) > len(short) for (_, answer), (_, short) in zip(longer, asked)] == [
        True
    ] * 4


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_of_any_format(made: Made, tmp_path: Path, capsys) -> None:
    turns = [
        {"role": "user", "content": "Reverse: sun"},
        {"role": "assistant", "content": "sun"},
    ]
    rows = [
        {"prompt": "Reverse: red fan", "completion": "fan red"},
        {"prompt": "Reverse: ant"},
        {"messages": [*turns, {"role": "user", "content": "again"}, turns[1]]},
        {"text": "red fan jet"},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"instruction": "Reverse: box", "output": "box"},
        {"question": "Reverse: cat", "answer": "cat"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = evaluate(
        [made.adapter], tmp_path / "out", data=str(data), adds_base=False, general=False
    )
    lines = read_answers(tmp_path / "out")
    assert [line["row"] for line in lines if line["answer"] is None] == [4, 5]
    assert [line["row"] for line in lines if line["expected"] is None] == [2, 4, 5]
    assert [line["row"] for line in lines if "tokens" not in line] == [2]
    assert lines[4]["tokens"] == 2
    assert found["models"][0]["metrics"]["loss"]["count"] == 7
    assert found["models"][0]["metrics"]["exact"]["count"] == 5
    only_asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "Hi"}])
    found = evaluate([made.adapter], tmp_path / "o", data=str(only_asked), general=False)
    assert found["metrics"] == []
    assert read_answers(tmp_path / "o")[0]["answer"] is not None
    assert "no row has an expected answer" in capsys.readouterr().err


def test_odd_rows_are_told_each_once(made: Made, tmp_path: Path, capsys) -> None:
    rows = [
        {"prompt": "Reverse: red fan", "completion": "fan red"},
        {"prompt": "red " * 3000, "completion": "fan"},
        {"prompt": "Reverse: red fan", "completion": "fan red"},
        {"prompt": 7, "completion": "fan"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    given = {"data": str(data), "general": False, "adds_base": False}
    with pytest.raises(LoraError, match=r"rows.jsonl:4: prompt is a number") as caught:
        evaluate([made.adapter], tmp_path / "out", **given)
    write_rows(data, rows[:3])
    with pytest.raises(
        LoraError, match=r"rows.jsonl:2: .* reads \d+ tokens, and the row has 3\d\d\d"
    ) as caught:
        evaluate([made.adapter], tmp_path / "out", **given)
    assert "--on-bad-row skip" in caught.value.hint
    capsys.readouterr()
    write_rows(data, rows)
    found = evaluate(
        [made.adapter], tmp_path / "out", **given, skips_bad=True, sampling=Sampling(1, 0.0)
    )
    said = capsys.readouterr().err
    assert f"1 bad row of 4 is left out; the first is {data}:4: prompt is a number" in said
    assert f"1 of 3 rows is left out: {data}:2\n" in said
    assert "2 of 3 answers did not end within 1 token" in said
    assert found["models"][0]["unended"] == 2
    assert found["models"][0]["metrics"]["loss"]["count"] == 2
    # without skipping, what was skipped is an error again
    write_rows(data, rows[:3])
    evaluate([made.adapter], tmp_path / "out", **given, skips_bad=True)
    with pytest.raises(LoraError, match="rows.jsonl:2"):
        evaluate([made.adapter], tmp_path / "out", **given)


def test_a_loss_that_is_not_finite_is_told(made: Made, tmp_path: Path, monkeypatch, capsys) -> None:
    own = token_losses.HFReading.read

    def spoil(self, pieces):
        return [
            each._replace(loss=each.loss._replace(total=math.nan)) for each in own(self, pieces)
        ]

    monkeypatch.setattr(token_losses.HFReading, "read", spoil)
    found = evaluate(
        [made.adapter], tmp_path / "out", data=str(made.data), metrics=["loss"], adds_base=False
    )
    assert found["models"][0]["metrics"]["loss"]["value"] is None
    assert found["models"][0]["forgetting"]["loss"] is None
    output = capsys.readouterr()
    assert "12 of 12 rows have a loss that is not finite" in output.err
    assert "not finite" in output.out
    json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_a_gguf_alone_has_answers_and_says_why_no_loss(made: Made, tmp_path: Path, capsys) -> None:
    found = evaluate([made.gguf], tmp_path / "out", data=str(made.data), max_rows=2)
    said = capsys.readouterr().err
    assert "no loss: a GGUF file does not tell which tokens are the answer's" in said
    assert found["models"][0]["metrics"]["loss"]["count"] == 0
    assert found["models"][0]["metrics"]["exact"]["count"] == 2
    assert found["models"][0]["forgetting"] is None


def test_numbers_are_counted_as_by_hand(made: Made, tmp_path: Path, monkeypatch, capsys) -> None:
    """Answers and expected ones as GSM8K writes them, whose numbers are read here by other "
    "means."""
    answers = ["12 - 2 = 10\n#### 10", "so it is $1,200.", "#### 7 apples", "I cannot say", "-3.50"]
    right = ["#### 10", "1000+200\n#### 1,200", "#### 8", "#### 0", "#### -3.5"]
    rows = [{"question": f"{n}?", "answer": text} for n, text in enumerate(right)]
    data = write_rows(tmp_path / "gsm.jsonl", rows)

    def write(self, asked, sampling):
        numbers = [int(each.messages[-1]["content"].rstrip("?")) for each in asked]
        own = "" if self.adapter else "\x1b[31m<b>"  # the base colours the terminal
        return [decoder.Written(own + answers[number], True) for number in numbers]

    monkeypatch.setattr(HFAnswerer, "write", write)
    found = evaluate([made.adapter], tmp_path / "out", data=str(data), general=False)
    by_hand = [10 == 10, 1200 == 1200, 7 == 8, False, -3.5 == -3.5]
    assert found["metrics"] == ["loss", "perplexity", "numeric", "f1"]
    assert found["models"][1]["metrics"]["numeric"]["value"] == sum(by_hand) / 5
    lines = [line for line in read_answers(tmp_path / "out") if line["model"] != "base"]
    assert [line["scores"]["numeric"] for line in lines] == list(map(float, by_hand))
    shown = capsys.readouterr().out
    assert "[31m<b>" in shown
    assert "\x1b" not in shown, "an answer wrote to the terminal"


def test_a_model_of_another_task_is_sent_to_lora_predict(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    folder = tmp_path / "a classifier"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="lora predict has their metrics") as caught:
        evaluate([folder], tmp_path / "out", data="my rows.jsonl")
    assert caught.value.hint == f"lora predict '{folder}' --data 'my rows.jsonl'"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": ["exakt"]}, "--metrics exakt: there is no such metric"),
        ({"metrics": ["regex"]}, "--metrics regex needs a pattern"),
        ({"metrics": ["exact"], "pattern": "x"}, "--regex is for the metric regex"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"tasks_path": Path("x")}, "--tasks-path is for --tasks"),
        ({"data": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"columns": ["prompt=gone"]}, "--column prompt=gone: there is no column gone"),
    ],
)
def test_wrong_options(made: Made, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraError, match=said.replace("(", r"\(")):
        evaluate([made.adapter], tmp_path / "out", **{"data": str(made.data)} | given)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_unlike_files_is_answered_with_an_option_that_works(tmp_path: Path) -> None:
    """A recipe takes a list of files, --data one."""
    for name, columns in (("a", ["prompt", "completion"]), ("b", ["prompt", "other"])):
        table = pyarrow.table({column: ["x"] for column in columns})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(LoraError, match="--data the folder .* cannot be read as rows") as caught:
        input_rows.find_source(str(tmp_path), {})
    assert caught.value.hint == f"--data {tmp_path}/a.parquet"


def test_a_folder_of_something_else_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(LoraError, match=r"holds thesis.tex, and no evaluation"):
        evaluate([made.adapter], tmp_path / "out", data=str(made.data))


def test_the_command_line_asks_for_all_of_it(lora, tiny: Path, tmp_path: Path) -> None:
    words = ["evaluate", tiny / "model", "--data", tiny / "eval.jsonl", "--max-rows", 2]
    words += ["--metrics", "exact, f1,regex", "--regex", "x(.)", "--max-new-tokens", 3]
    words += ["--no-forgetting", "--out", tmp_path / "out", "--batch-size", 1]
    done = lora(*words, "--json")
    assert done.returncode == 0, done.stderr
    said, written = (
        json.loads(done.stdout),
        json.loads((tmp_path / "out/evaluation.json").read_text()),
    )
    assert said == {name: value for name, value in written.items() if name != "answers_sha256"}
    assert said["metrics"] == ["exact", "f1", "regex"]
    assert said["regex"] == "x(.)"
    assert (said["data"]["rows"], said["sampling"]["max_new_tokens"]) == (2, 3)
    assert said["models"][0]["forgetting"] is None
    done = lora(*words, "--show", 0)
    assert "as computed before" in done.stderr
    assert done.stdout.startswith("metric")
    done = lora("evaluate", tiny / "model", "--data", tiny / "eval.jsonl", "--metrics", "exakt")
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: --metrics exakt: there is no such metric\n\nhint: did you mean exact?\n"
    )


def test_the_first_rows_and_a_checkpoint_have_folders_of_their_own(
    made: Made, tmp_path: Path
) -> None:
    """Or they would take the place of the adapter's own evaluation."""
    shutil.copytree(made.adapter.parent, tmp_path / "run")
    shutil.copytree(made.adapter, tmp_path / "run" / "checkpoint-20")
    for name, rows in (("adapter", 1), ("adapter", 2), ("checkpoint-20", 2)):
        request = Request(
            str(made.data), ("exact",), max_rows=rows, general=False, adds_base=False,
            sampling=Sampling(2, 0.0),
        )  # fmt: skip
        score.evaluate([str(tmp_path / "run" / name)], request)
    found = {path.name for path in (tmp_path / "run" / "evaluations").iterdir()}
    first = "held out-first-"
    assert found == {f"{first}1", f"{first}2", f"{first}2-checkpoint-20"}
