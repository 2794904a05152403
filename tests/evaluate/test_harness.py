"""`lora evaluate --tasks`: lm-eval on the model that is loaded gives what plain transformers give,
and leaves the model as it is.

Hermetic: the tiny model, an adapter of random numbers, a task file made here. Alone: pytest
tests/evaluate/test_harness.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.evaluate import harness, score
from lora_cli.evaluate.score import Request

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WORDS = (
    "red dog sun tea ice kit gas map jet fan zoo web sea net gem ant box oak yak day cat".split()
)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B is not zero, with the base's tokenizer."""
    folder = tmp_path_factory.mktemp("harness") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {
            "question": f"Reverse: {a} {b}",
            "choices": [f" {b} {a}", f" {a} {b}", f" {c}"],
            "answer": n % 3,
        }
        for n, (a, b, c) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:]))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "turns.yaml").write_text(TASK.format(name="turns", rows=tmp_path / "rows.jsonl"))
    return folder


def choose_plainly(network, tokenizer, rows: list[dict]) -> float:
    """The share of rows whose likeliest choice is the right one."""
    right = 0
    for row in rows:
        sums = []
        asked = tokenizer(row["question"])["input_ids"]
        for choice in row["choices"]:
            whole = tokenizer(row["question"] + choice)["input_ids"]
            ids = torch.tensor([whole])
            with torch.no_grad():
                chances = functional.log_softmax(network(input_ids=ids).logits[0].float(), -1)
            places = range(len(asked), len(whole))
            sums.append(sum(float(chances[at - 1, whole[at]]) for at in places))
        right += sums.index(max(sums)) == row["answer"]
    return right / len(rows)


def test_a_task_of_a_local_file_is_what_transformers_say(
    tiny: Path, adapter: Path, tasks: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Without a network: the file is all that lm-eval needs. lm-eval ties weights of what it is
    given, which here reaches nothing."""
    tied = []
    monkeypatch.setattr(
        type(AutoModelForCausalLM.from_pretrained(tiny / "model")),
        "tie_weights",
        lambda *a, **k: tied.append(1),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    wanted = {"base": choose_plainly(base, tokenizer, rows)}
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    wanted["adapter"] = choose_plainly(adapted, tokenizer, rows)
    assert wanted["base"] != wanted["adapter"], "the adapter would not be noticed"
    before = {}
    own = harness.run_tasks

    def run_tasks(tasks, label, answerer, size):
        before[label] = answerer.network.get_input_embeddings().weight.clone()
        tied.clear()
        found = own(tasks, label, answerer, size)
        assert not tied
        assert torch.equal(before[label], answerer.network.get_input_embeddings().weight)
        return found

    monkeypatch.setattr(harness, "run_tasks", run_tasks)
    request = Request(
        None,
        out=tmp_path / "out",
        tasks=["turns"],
        tasks_path=tasks,
        general=False,
        adds_base=False,
    )
    paths = [str(adapter), str(tiny / "model")]  # the base with the adapter on it by then
    score.evaluate(paths, request)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    said = {each["kind"]: each["tasks"]["results"]["turns"][0] for each in found["models"]}
    assert {kind: result[:2] for kind, result in said.items()} == {
        kind: ["acc", pytest.approx(share)] for kind, share in wanted.items()
    }
    output = capsys.readouterr()
    assert "lm-eval: turns" in output.err
    assert "loglikelihood" not in output.err
    assert "turns" in output.out
    # a second time nothing is computed
    monkeypatch.setattr(harness, "run_tasks", lambda *given: pytest.fail("computed again"))
    score.evaluate(paths, request)


@pytest.mark.slow  # lm-eval reads the files of all its tasks each time
def test_an_unknown_task_is_named(adapter: Path, tasks: Path, tmp_path: Path) -> None:
    request = Request(None, out=tmp_path / "out", tasks=["turn"], tasks_path=tasks)
    with pytest.raises(UsageError, match="--tasks turn: lm-eval knows no such task") as caught:
        score.evaluate([str(adapter)], request)
    assert caught.value.hint == "did you mean turns?"
    with pytest.raises(UsageError, match="gone is not a folder"):
        score.evaluate([str(adapter)], request._replace(tasks_path=tmp_path / "gone"))


@pytest.mark.slow
def test_a_damaged_task_file_is_named(adapter: Path, tasks: Path, tmp_path: Path) -> None:
    (tasks / "turns.yaml").write_text("task: turns\ndataset_path: [\n")
    request = Request(None, out=tmp_path / "out", tasks=["turns"], tasks_path=tasks)
    with pytest.raises(LoraError, match="turns") as caught:
        score.evaluate([str(adapter)], request)
    print(caught.value.message, caught.value.hint)
    (tasks / "turns.yaml").write_text(TASK.format(name="turns", rows=tmp_path / "gone.jsonl"))
    with pytest.raises(LoraError, match="lm-eval could not run turns: .*gone.jsonl") as caught:
        score.evaluate([str(adapter)], request)
    print(caught.value.message, caught.value.hint)


def test_without_lm_eval_the_extra_is_named(adapter: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    request = Request(None, out=tmp_path / "out", tasks=["turns"])
    with pytest.raises(LoraError, match="--tasks needs lm-eval") as caught:
        score.evaluate([str(adapter)], request)
    assert caught.value.hint == "pip install 'lora-cli[bench]'"
