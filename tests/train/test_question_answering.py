"""Answers to questions, from rows to a merged model: what is measured, what merges, what PEFT's own
class for the task leaves out.

Hermetic: random bases of two layers, CPU. Alone: pytest tests/train/test_question_answering.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from lora_cli.common import LoraError
from lora_cli.evaluate.predict import Options, predict
from lora_cli.evaluate.predictors import Reading
from lora_cli.evaluate.verify import verify
from lora_cli.merge.merge import merge
from lora_cli.models import Base, load_tokenizer, read_adapter
from lora_cli.plan import rehearsal, settled, weightless
from lora_cli.recipe import load_recipe, upstream
from lora_cli.train import run
from tests import tasks

TASK = "question_answering"
WINDOW, STRIDE = 32, 8


def train(folder: Path, base: Path, *overrides: str, method: str = "lora") -> Path:
    """Train on sixteen questions, four steps; return the adapter."""
    recipe = tasks.write_recipe(folder, TASK, base, method)
    return run.train(load_recipe(recipe, ["training.save_strategy='no'", *overrides]))


def read_metrics(run_folder: Path) -> dict[str, float]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "eval_loss" in line][-1]


# Measured -----------------------------------------------------------------------------------------


def answer(network: Any, tokenizer: Any, row: dict[str, Any]) -> str:
    """Answer a question as transformers' examples do: windows of the tokenizer's own, every pair of
    places."""
    given = tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=WINDOW,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found, nothing = [], []
    for at, ids in enumerate(given["input_ids"]):
        with torch.no_grad():
            said = network(input_ids=torch.tensor([ids]))
        start, end = said.start_logits[0].tolist(), said.end_logits[0].tolist()
        nothing.append(start[0] + end[0])
        inside = [place for place, part in enumerate(given.sequence_ids(at)) if part == 1]
        offsets = given["offset_mapping"][at]
        found += [
            (start[a] + end[b], row["context"][offsets[a][0] : offsets[b][1]])
            for a in inside
            for b in inside
            if a <= b < a + 30
        ]
    score, text = max(found)
    return "" if min(nothing) > score else text


def test_it_learns_and_is_measured_as_by_a_loop_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 150 steps it finds more than half of the answers; how many, a loop over the merged model
    tells that shares nothing with training's."""
    base = tasks.make_base(tmp_path / "base", "modernbert")
    tasks.write_questions(tmp_path / "eval.jsonl", 60, seed=5)
    recipe = tasks.write_recipe(tmp_path, TASK, base)
    tasks.write_questions(tmp_path / "train.jsonl", 400)
    more = ["lora.r=8", "lora.lora_alpha=32", f"data.eval_path={tmp_path / 'eval.jsonl'}"]
    more += [f"training.max_length={WINDOW}", f"data.stride={STRIDE}", "training.max_steps=150"]
    more += ["training.per_device_train_batch_size=16", "training.learning_rate=0.003"]
    more += ["training.save_strategy='no'", "training.logging_steps=50"]
    adapter = run.train(load_recipe(recipe, more))
    measured = read_metrics(tmp_path / "run")
    merge(adapter, tmp_path / "merged", None, None, False)
    network = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    right = {True: [], False: []}
    for row in rows:
        accepted = [each["text"] for each in row["answers"]] or [""]
        right[bool(row["answers"])].append(answer(network, tokenizer, row) in accepted)
    both = [*right[True], *right[False]]
    assert measured["eval_exact_match"] == pytest.approx(sum(both) / len(both))
    for name, some in (("has_answer_exact", right[True]), ("no_answer_accuracy", right[False])):
        assert measured[f"eval_{name}"] == pytest.approx(sum(some) / len(some))
    for path in (adapter, tmp_path / "merged"):  # `lora predict` says the same
        out = tmp_path / f"{path.name}.jsonl"
        options = Options(Reading(max_length=WINDOW), as_json=True)
        capsys.readouterr()
        predict([str(path)], str(tmp_path / "eval.jsonl"), [], out, None, [], options)
        metrics = json.loads(capsys.readouterr().out)["metrics"][str(path)]
        assert metrics == pytest.approx({name: measured[f"eval_{name}"] for name in metrics})
        said = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
        assert [text or "" for text in said] == [answer(network, tokenizer, row) for row in rows]
    assert 0.5 < measured["eval_exact_match"] < measured["eval_f1"]
    assert measured["eval_f1"] > 0.75


# Merged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora", "qdora"])
def test_both_ways_to_merge_give_one_model(tmp_path: Path, method: str) -> None:
    """The head is trained whole and never in 4 bits, and it is the adapter's in the merged model."""
    base = tasks.make_base(tmp_path / "base", "bert")
    adapter = train(tmp_path, base, method=method)
    names = ("streamed", "whole")
    for name in names:
        merge(adapter, tmp_path / name, None, name == "streamed", False)
    streamed, whole = (load_file(tmp_path / name / "model.safetensors") for name in names)
    assert streamed.keys() == whole.keys() and "qa_outputs.weight" in whole
    assert max((streamed[key] - whole[key]).abs().max().item() for key in whole) < 1e-6
    own = load_file(adapter / "adapter_model.safetensors")
    head = own["base_model.model.qa_outputs.weight"]
    assert torch.equal(head, streamed["qa_outputs.weight"])
    assert "tensors equal" in verify(str(adapter), str(tmp_path / "whole"), None)
    if method != "lora":
        recipe = settled.settle_recipe(load_recipe(tmp_path / "recipe.yaml")).recipe
        kept = upstream.build_quantization_config(recipe)
        loaded = Base.of_recipe(recipe).load(torch.float32, kept)
        kinds = {path: type(module).__name__ for path, module in loaded.named_modules()}
        assert kinds["qa_outputs"] == "Linear"
        assert "Linear4bit" in kinds.values()
    merged = read_adapter(adapter).base.task
    assert merged.name == Base.of_model(str(tmp_path / "whole")).task.name == TASK


@pytest.mark.parametrize("labels", [["bad", "good", "neutral"], ["bad", "good"]])
def test_a_base_that_told_labels_apart_gets_a_head_of_two_places(
    tmp_path: Path, labels: list[str]
) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    network = BertForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    network.config.id2label = dict(enumerate(labels))
    network.save_pretrained(base)
    adapter = train(tmp_path, base)
    merge(adapter, tmp_path / "merged", None, None, False)
    made = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged")
    assert made.config.num_labels == made.qa_outputs.out_features == 2
    assert "good" not in (tmp_path / "merged" / "config.json").read_text()


# What PEFT's class leaves out ---------------------------------------------------------------------


def test_peft_hands_no_token_types_on(tmp_path: Path) -> None:
    """Why rows of this task have none. Once PEFT hands them on, this fails, and they can go back
    in: the task's `lost_inputs`."""
    network = BertForQuestionAnswering.from_pretrained(tasks.make_base(tmp_path, "bert")).eval()
    ids = torch.tensor([[2, 5, 6, 3, 7, 8, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = [network(input_ids=ids, token_type_ids=each) for each in (types, None)]
        adapted = get_peft_model(network, LoraConfig(r=4, task_type="QUESTION_ANS"))
        given = [adapted(input_ids=ids, token_type_ids=each) for each in (types, None)]
    apart = [(a.start_logits - b.start_logits).abs().max() for a, b in (alone, given)]
    assert apart[0] > 1e-3 and apart[1] == 0


def test_an_adapter_made_by_peft_merges_to_what_it_was(tmp_path: Path, capfd) -> None:
    """It was trained without token types, and the merged model's tokenizer makes none."""
    base = tasks.make_base(tmp_path / "base", "bert")
    torch.manual_seed(3)
    network = BertForQuestionAnswering.from_pretrained(base)
    config = LoraConfig(r=4, task_type="QUESTION_ANS", init_lora_weights=False)
    adapted = get_peft_model(network, config).eval()
    adapted.save_pretrained(str(tmp_path / "made"))
    merge(tmp_path / "made", tmp_path / "merged", None, None, False)
    assert "token_type_ids are left out" in capfd.readouterr().err
    merged = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    pair = ("good nice", "table house good nice river")
    with torch.no_grad():
        wanted = adapted(**AutoTokenizer.from_pretrained(base)(*pair, return_tensors="pt"))
        own = AutoTokenizer.from_pretrained(tmp_path / "merged")(*pair, return_tensors="pt")
        found = merged(**own)
    assert "token_type_ids" not in own
    assert (found.end_logits - wanted.end_logits).abs().max() < 1e-5
    loaded = PeftModel.from_pretrained(
        BertForQuestionAnswering.from_pretrained(base), str(tmp_path / "made")
    )
    assert "token_type_ids" not in load_tokenizer(str(tmp_path / "merged")).model_input_names
    assert type(loaded).__name__ == "PeftModelForQuestionAnswering"


# Trained otherwise --------------------------------------------------------------------------------

OTHERWISE: dict[str, Callable[[Path], list[str]]] = {
    "eva": lambda _: ["lora.init_lora_weights=eva"],
    "corda": lambda _: ["lora.init_lora_weights=corda"],
    "lora_ga": lambda _: ["lora.init_lora_weights=lora_ga"],
    "a stream": lambda _: ["data.streaming=true"],
    "a mix": lambda rows: [f"data.mix=[{{path: {rows}, weight: 1.5}}]", "data.path=null"],
    "smoothed labels": lambda _: ["training.label_smoothing_factor=0.1"],
    "the best by exact_match": lambda rows: [
        f"data.eval_path={rows}",
        "training.metric_for_best_model=exact_match",
    ],
    "the best by what no row has": lambda rows: [
        f"data.eval_path={_leave_answered(rows)}",
        "training.metric_for_best_model=no_answer_accuracy",
        "training.lr_scheduler_type=reduce_lr_on_plateau",
    ],
}


def _leave_answered(rows: Path) -> Path:
    """A file of those of some questions that have an answer."""
    lines = [line for line in rows.open() if json.loads(line)["answers"]]
    assert lines
    file = rows.with_name("answered.jsonl")
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_else_training_can_do_it_does_for_questions(tmp_path: Path, name: str) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    rows = tasks.write_questions(tmp_path / "train.jsonl", 16)
    adapter = train(tmp_path, base, "training.max_length=24", *OTHERWISE[name](rows))
    merge(adapter, tmp_path / "merged", None, None, False)  # which compares it with training's


def test_training_goes_on_from_an_adapter(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    first = train(tmp_path, base)
    config = json.loads((first / "config.json").read_text())
    config["id2label"] = {"0": "begins", "1": "ends"}  # as another program may call them
    (first / "config.json").write_text(json.dumps(config))
    second = train(tmp_path, base, f"model.adapter={first}", f"output_dir={tmp_path / 'second'}")
    assert load_recipe(tmp_path / "second" / "recipe.yaml").model.labels == "auto"
    assert read_adapter(second).base.task.name == TASK


def test_the_plan_foresees_its_memory(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    recipe = load_recipe(tasks.write_recipe(tmp_path, TASK, base))
    found = settled.settle_recipe(recipe)
    adapted = weightless.build_adapted(found.recipe, found.base.config, len(tasks.VOCABULARY), [])
    peaks = rehearsal.Rehearsal(found.recipe, adapted).step(rehearsal.Batch(4, 24, False))
    assert peaks.all["activations"] > 4 * 24 * 64 * 4


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_base_that_would_be_random_is_refused(tmp_path: Path, family: str) -> None:
    """transformers' class calls the base `transformer`, and its files call it `model`: it would
    load nothing of them, with a warning."""
    base = tasks.make_base(tmp_path / "base", family)
    with pytest.raises(LoraError, match=r"do not fit \w+ForQuestionAnswering: \d\d are missing"):
        train(tmp_path, base)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    base = tasks.make_base(tmp_path / "base", "bert")
    rows = tasks.write_questions(tmp_path / "train.jsonl", 16)
    more = [f"data.eval_path={rows}", "training.metric_for_best_model=exact_matches"]
    with pytest.raises(LoraError, match="exact_matches; there are loss, .*, exact_match, f1"):
        train(tmp_path, base, *more)
