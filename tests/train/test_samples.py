"""Sample prompts are answered as `lora generate` answers them, and change nothing of what is
trained; a run that was stopped has the same answers.

Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_samples.py
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from lora_cli.common import LoraError
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.recipe import load
from lora_cli.train import run, samples, trial
from lora_cli.train.resume import Resumable
from lora_cli.train.trainers import Watched

PROMPTS = ["Reverse: jet fan red", "Reverse: tea ice"]
ASKED = f"sample_prompts: {json.dumps(PROMPTS)}, sample_tokens: 9"


def recipe(write_recipe, tiny: Path, folder: Path, asked: str, more: str = "", evaluated=True):
    evaluation = f"data: {{eval_path: {tiny / 'eval.jsonl'}, eval_split: 'train[:4]'}}\n"
    steps = "eval_strategy: steps, eval_steps: 2, " if evaluated else ""
    return load.load_recipe(
        write_recipe(
            f"output_dir: {folder}\n{evaluation if evaluated else ''}{more}\n"
            f"training: {{max_steps: 6, {steps}save_strategy: steps, save_steps: 2, {asked}}}\n"
        )
    )


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


WAYS = [
    "method: qdora\nlora: {lora_dropout: 0.1}",
    "method: qlora\nmodel: {dtype: bfloat16}\ntrainer: trainer",
    "method: dora\nmodel: {dtype: bfloat16}\nlora: {lora_dropout: 0.1}",
    "method: lora\ntraining: {packing: dataset, gradient_checkpointing: true}",
    "method: lora\nlora: {init_lora_weights: pissa}\ntraining: {packing: false, loss_head: stock}",
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.partition("\n")[0])
def test_what_is_trained_does_not_change(write_recipe, tiny: Path, tmp_path: Path, way) -> None:
    way, _, training = way.partition("\ntraining: {")
    more = f"{training.rstrip('}')}, " if training else ""
    given = (write_recipe, tiny)
    run.train(recipe(*given, tmp_path / "without", f"{more}logging_steps: 1", way))
    run.train(recipe(*given, tmp_path / "with", f"{more}logging_steps: 1, {ASKED}", way))
    files = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("without", "with")
    ]
    assert files[0] == files[1]
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = read(tmp_path / "with")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (0, 2, 4, 6) for prompt in PROMPTS
    ]
    assert len({line["answer"] for line in found}) > 2


@pytest.mark.parametrize("evaluated", [True, False])
def test_answers_are_those_of_generate(
    write_recipe, tiny: Path, tmp_path: Path, evaluated: bool
) -> None:
    adapter = run.train(recipe(write_recipe, tiny, tmp_path / "a", ASKED, evaluated=evaluated))
    models = open_models([str(adapter), str(tiny / "model")])
    trained, base = (
        [each.answer([Asked([{"role": "user", "content": prompt}])], Sampling(9, 0))[0]
         for prompt in PROMPTS]
        for each in models.values()
    )  # fmt: skip
    found = read(tmp_path / "a")
    assert [line["answer"] for line in found if line["step"] == 0] == base
    assert [line["answer"] for line in found if line["step"] == 6] == trained
    assert trained != base
    assert len(found) == (8 if evaluated else 4)


@pytest.mark.parametrize("point", ["answering", "evaluating", "killed", "at the end"])
def test_a_stopped_run_has_the_same_answers(
    write_recipe, tiny: Path, tmp_path: Path, monkeypatch, point: str
) -> None:
    evaluated = point != "at the end"
    given = ASKED, "lora: {lora_dropout: 0.1}", evaluated
    run.train(recipe(write_recipe, tiny, tmp_path / "whole", *given))
    stopped = recipe(write_recipe, tiny, tmp_path / "stopped", *given)
    calls = []

    def stop(owner: type, name: str, number: int, how) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                how()
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    def kill() -> None:
        raise SystemExit

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trial, "try_training", lambda recipe: None)
        if point == "answering":
            stop(samples.Samples, "answer", 3, terminate)
        elif point == "evaluating":
            stop(Watched, "prediction_step", 2, terminate)
        elif point == "killed":
            stop(Watched, "training_step", 6, kill)
        else:
            stop(Resumable, "sample", 2, kill)
        with pytest.raises(SystemExit):
            run.train(stopped)
    assert len(calls) >= 2
    run.train(stopped, resume=True)
    whole, again = (tmp_path / name for name in ("whole", "stopped"))
    assert (again / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    adapters = [each / "adapter" / "adapter_model.safetensors" for each in (whole, again)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    lines = [(each / "metrics.jsonl").read_text().splitlines() for each in (whole, again)]
    assert len(lines[0]) == len(lines[1])


def test_prompts_may_change_where_a_run_goes_on(write_recipe, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run.train(recipe(write_recipe, tiny, folder, ASKED))
    other = recipe(write_recipe, tiny, folder, "sample_prompts: [other], sample_tokens: 3")
    other = other.replace("auto", {"training": {"max_steps": 8}})
    keys = ("max_steps", "sample_prompts", "sample_tokens")
    run.train(other, resume=True, allowed=[f"training.{key}" for key in keys])
    assert [(line["step"], line["prompt"]) for line in read(folder)][-3:] == [
        (6, PROMPTS[0]),
        (6, PROMPTS[1]),
        (8, "other"),
    ]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "others"])
def test_files_that_are_damaged_are_mended_where_a_run_goes_on(
    write_recipe, tiny: Path, tmp_path: Path, capsys, damage: str
) -> None:
    """What was said of steps that are done is no reason to lose those that are to come."""
    folder = tmp_path / "run"
    adapter = run.train(recipe(write_recipe, tiny, folder, ASKED))
    for name in ("samples.jsonl", "metrics.jsonl"):
        file = folder / name
        whole = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            texts = {"cut": whole[:40], "empty": b"", "others": b'[1]\n{"step": "x"}\n\xff\n'}
            file.write_bytes(texts[damage])
    longer = recipe(write_recipe, tiny, folder, ASKED)
    longer = longer.replace("auto", {"training": {"max_steps": 8}})
    run.train(longer, resume=True, allowed=["training.max_steps"])
    said = capsys.readouterr().err
    assert f"{folder / 'samples.jsonl'} has 0 of the 8 lines up to the checkpoint" in said
    assert f"{folder / 'metrics.jsonl'} has 0 of the " in said
    assert adapter.is_dir()
    assert [(line["step"], line["prompt"]) for line in read(folder)] == [(8, p) for p in PROMPTS]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in logged} == {8}


def test_a_prompt_that_leaves_no_room_has_no_answer(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    asked = f"sample_prompts: ['{'tea ' * 3000}'], sample_tokens: 3"
    run.train(recipe(write_recipe, tiny, tmp_path / "run", asked, evaluated=False))
    assert [line["answer"] for line in read(tmp_path / "run")] == ["", ""]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("training: {sample_prompts: ['']}", "training.sample_prompts"),
        ("training: {sample_prompts: hello}", "training.sample_prompts"),
        ("training: {sample_tokens: 0}", "training.sample_tokens"),
        (
            "task: sequence_classification\ntraining: {sample_prompts: [a]}",
            "training.sample_prompts is for models that write text, and task is",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(write_recipe, given: str, said: str) -> None:
    with pytest.raises(LoraError, match=said):
        load.load_recipe(write_recipe(given + "\n"))
