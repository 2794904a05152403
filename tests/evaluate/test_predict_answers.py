"""`lora predict` on questions: the answers are those of a loop over transformers' model and windows
of the tokenizer's own, every pair of places tried.

Hermetic: models of two layers with random weights. Alone: pytest
tests/evaluate/test_predict_answers.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_cli.common.errors import LoraError
from lora_cli.evaluate.predict import Options, predict
from lora_cli.evaluate.predictors import Reading
from tests import tasks

SEEDS = {"bert": 1, "modernbert": 2}
"""Of these, each model says of some text that it has no answer."""
WINDOW, STRIDE, LONGEST = 32, 14, 30
"""Windows share half of the 28 tokens that a question of one word leaves at most."""


@pytest.fixture(scope="module", params=SEEDS)
def network(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A whole model; BERT's tokenizer makes segments, and its network reads them."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tasks.make_base(folder / "base", request.param)
    torch.manual_seed(SEEDS[request.param])
    made = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
    for name, module in made.named_children():
        if name in ("qa_outputs", "classifier"):
            module.weight.data.normal_()
    if request.param == "bert":
        made.bert.embeddings.token_type_embeddings.weight.data.normal_()
    made.save_pretrained(folder / "whole")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder / "whole")
    return folder / "whole"


def ask(path: Path, data: Path, out: Path, options: Options, **given: Any) -> list[dict[str, Any]]:
    predict([str(path)], str(data), [], out, None, given.get("columns", []), options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_questions(folder: Path, count: int = 40) -> list[dict[str, Any]]:
    lines = tasks.write_questions(folder / "questions.jsonl", count, seed=3).read_text()
    return [json.loads(line) for line in lines.splitlines()]


def find_by_loop(network: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[Any, Any, Any, float]:
    """The answer with its place and the likelihood of both its ends in its window."""
    given = tokenizer(
        row["question"], row["context"], truncation="only_second", max_length=WINDOW,
        stride=STRIDE, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    found, nothing = [], []
    for at in range(len(given["input_ids"])):
        fed = {name: torch.tensor([given[name][at]]) for name in tokenizer.model_input_names}
        with torch.no_grad():
            said = network(**fed)
        start, end = said.start_logits[0], said.end_logits[0]
        likely = start.double().softmax(0)[:, None] * end.double().softmax(0)[None]
        scores = start[:, None] + end[None]
        nothing.append((float(scores[0, 0]), float(likely[0, 0])))
        inside = [place for place, part in enumerate(given.sequence_ids(at)) if part == 1]
        offsets = given["offset_mapping"][at]
        found += [
            (float(scores[a, b]), float(likely[a, b]), offsets[a][0], offsets[b][1])
            for a in inside
            for b in inside
            if a <= b < a + LONGEST
        ]
    score, probability, first, last = max(found)
    if min(nothing)[0] > score:
        return None, None, None, min(nothing)[1]
    return row["context"][first:last], first, last, probability


def test_answers_are_those_of_a_loop_over_transformers_model(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_questions(tmp_path)
    reading = Reading(max_length=WINDOW, batch_size=3, everything=True)
    options = Options(reading, as_json=True)
    said = ask(network, tmp_path / "questions.jsonl", tmp_path / "out", options)
    whole = transformers.AutoModelForQuestionAnswering.from_pretrained(network).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(network)
    assert ("token_type_ids" in tokenizer.model_input_names) == (whole.config.model_type == "bert")
    for line, row in zip(said, rows, strict=True):
        text, start, end, probability = find_by_loop(whole, tokenizer, row)
        assert (line["answer"], line["start"], line["end"]) == (text, start, end)
        assert line["probability"] == pytest.approx(probability, rel=1e-4)
        assert line["expected"] == row["answers"]
        assert line["question"] == row["question"]
        best = max(line["windows"], key=lambda each: each["probability"])
        assert {each["answer"] for each in line["windows"]} >= {best["answer"]}
        assert all(e["answer"] == row["context"][e["start"] : e["end"]] for e in line["windows"])
    assert len({line["answer"] for line in said}) > 10
    assert max(len(line["windows"]) for line in said) > 1
    report = capsys.readouterr()
    right = sum(
        (line["answer"] or "") in ([each["text"] for each in row["answers"]] or [""])
        for line, row in zip(said, rows)
    )
    [metrics] = json.loads(report.out)["metrics"].values()
    assert metrics["exact_match"] == pytest.approx(right / len(rows))
    assert "cut at" not in report.err  # windows lose nothing


def test_a_row_s_answer_is_its_own_whatever_is_beside_it(network: Path, tmp_path: Path) -> None:
    rows = read_questions(tmp_path, 12)
    data = write(tmp_path / "rows.jsonl", [{**row, "answers": None} for row in rows])
    alone = [
        ask(network, data, tmp_path / f"out-{size}", Options(Reading(WINDOW, batch_size=size)))
        for size in (1, 5)
    ]
    for one, other in zip(*alone, strict=True):
        assert one.pop("probability") == pytest.approx(other.pop("probability"), rel=1e-4)
        assert one == other
        assert one.keys() == {"place", "question", "answer", "start", "end"}


def test_an_adapter_s_answers_are_those_of_its_merged_model(tmp_path: Path) -> None:
    """BERT's segments are what PEFT's class does not hand on, so that neither has them."""
    base = tasks.make_base(tmp_path / "base", "bert")
    torch.manual_seed(2)
    made = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="QUESTION_ANS")
    adapted = get_peft_model(made, lora)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data.normal_(std=1.0 if "qa_outputs" in name else 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    rows = read_questions(tmp_path)
    options = Options(Reading(WINDOW))
    said = ask(tmp_path / "adapter", tmp_path / "questions.jsonl", tmp_path / "out", options)
    fresh = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = [find_by_loop(merged, tokenizer, row)[:3] for row in rows]
    assert [(line["answer"], line["start"], line["end"]) for line in said] == found


def test_metrics_are_of_rows_that_say_what_is_right(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all rows have an answer, an evaluation does not take none for one: that is said."""
    rows = [row for row in read_questions(tmp_path, 60) if row["answers"]]
    without = {**rows[0], "answers": None, "is_impossible": False}
    data = write(tmp_path / "rows.jsonl", [*rows, without])
    options = Options(Reading(WINDOW, everything=True))
    said = ask(network, data, tmp_path / "out", options)
    report = capsys.readouterr()
    none = sum(line["answer"] is None for line in said[:-1])
    assert none
    assert f"{none} rows are said to have no answer; as all that say" in report.err
    assert f"{len(rows)} of {len(rows) + 1} rows say what is right" in report.err
    assert "expected" not in said[-1]
    assert said[-1]["answer"] == said[0]["answer"]
    some = ask(network, data, tmp_path / "2", Options(Reading(WINDOW, with_labels=False)))
    assert all("expected" not in line for line in some)
    assert "exact_match" not in capsys.readouterr().out


def test_bad_rows_are_named(network: Path, tmp_path: Path) -> None:
    good = {"question": "good", "context": "table great house", "answers": []}
    rows = [
        good,
        {**good, "answers": [{"text": "great", "answer_start": 0}]},
        {**good, "context": " "},
        {**good, "question": " ".join(["good"] * 40), "context": " ".join(["house"] * 40)},
        {"question": "good", "answers": []},
        {**good, "is_impossible": False},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    reading = Reading(WINDOW)
    said = ask(network, data, tmp_path / "out", Options(reading, skips_bad=True))
    assert [line.get("error", "")[:60] for line in said] == [
        "",
        "the answer 'great' is not at answer_start 0, where 'table' s",
        "context is empty",
        "the question has 43 tokens with those around it, which leave",
        "there is no context; the columns are question, answers",
        "is_impossible is false, and there is no answer",
    ]
    with pytest.raises(LoraError, match="is not at answer_start 0") as caught:
        ask(network, data, tmp_path / "out2", Options(reading))
    assert caught.value.hint
    unread = ask(
        network, data, tmp_path / "out3", Options(Reading(WINDOW, with_labels=False), (), True)
    )
    assert ["error" in line for line in unread] == [False, False, True, True, True, False]
    with pytest.raises(LoraError, match=r"questions.jsonl:\d+: \d+ tokens, over 32"):
        read_questions(tmp_path)
        ask(
            network,
            tmp_path / "questions.jsonl",
            tmp_path / "out4",
            Options(Reading(WINDOW, cuts=False)),
        )


@pytest.mark.parametrize("said", [0, 1])
def test_a_tokenizer_s_limit_that_leaves_no_room_is_none(
    network: Path, tmp_path: Path, said: int
) -> None:
    """The model's own number of places then is the limit."""
    copied = Path(shutil.copytree(network, tmp_path / "model"))
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings["model_max_length"] = said
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    long = {"question": "good", "context": "table great " * 400, "answers": []}
    data = write(tmp_path / "rows.jsonl", [long])
    [line] = ask(copied, data, tmp_path / "out", Options(Reading(everything=True)))
    positions = {"bert": 512, "modernbert": 8192}[network.parent.name.rstrip("0123456789")]
    assert (len(line["windows"]) > 1) == (positions < 800)
