"""`lora evaluate ADAPTER` without data: the rows that its own run evaluated on, and no other.

Hermetic: the tiny model, CPU. Alone: pytest tests/evaluate/test_own_rows.py
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_cli import recipe
from lora_cli.common.errors import LoraError, UsageError
from lora_cli.data import formats
from lora_cli.evaluate import compared_rows, generate, held_out, score
from lora_cli.evaluate.answerers import Sampling
from lora_cli.evaluate.score import Request
from lora_cli.recipe import load
from lora_cli.train import receipt, run

KTO = recipe.name_objective("kto")

KINDS = {
    "one file": "{{path: {one}, eval_rows: 9}}",
    "named columns": "{{path: {one}, eval_fraction: 0.2, columns: {{prompt: q, completion: a}}}}",
    "a mix": "{{mix: [{{path: {one}}}, {{path: {two}, weight: 2}}], eval_rows: 11}}",
    "a stream": "{{path: {one}, streaming: true, eval_rows: 7}}",
    "a file of its own": "{{path: {one}, eval_path: {two}}}",
    "its first rows": "{{path: {one}, max_rows: 30, eval_rows: 5}}",
}


def train(tiny: Path, folder: Path, kind: str) -> Path:
    """The adapter of a short run; two rows say the same."""
    lines = (tiny / "train.jsonl").read_text().splitlines()[:80]
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    first = [*lines[:40], lines[0], lines[1]]
    if kind == "named columns":
        first = [line.replace('"prompt"', '"q"').replace('"completion"', '"a"') for line in first]
    one.write_text("\n".join(first) + "\n")
    two.write_text("\n".join(lines[40:60]) + "\n")
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {KINDS[kind].format(one=one, two=two)}\n"
        "training: {max_steps: 2, per_device_train_batch_size: 8, learning_rate: 2e-3, "
        "max_length: 128, save_strategy: 'no', eval_strategy: steps, eval_steps: 2}\n"
        f"output_dir: {folder / 'run'}\n"
    )
    run.train(load.load_recipe(recipe, []))
    return folder / "run" / "adapter"


def evaluate(paths: Sequence[Path], **given: Any) -> dict[str, Any]:
    """What `lora evaluate` writes, without answers."""
    score.evaluate([str(path) for path in paths], Request(None, ("loss",), **given))
    folder = given.get("out") or paths[0].parent / "evaluations" / "held-out"
    return json.loads((folder / "evaluation.json").read_text())


def find_loss(folder: Path) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def test_better_answers_alone_are_scored_whatever_their_columns_are_called(tmp_path: Path) -> None:
    """As training found them: of a pair the chosen answer, of answers with a label the wanted."""
    rows = [(f"row {n}", {"question": f"q{n}", "answer": "a", "kto_tag": n == 1}) for n in range(3)]
    wanted = {
        "prompt": [{"role": "user", "content": "q1"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert compared_rows.take_better(rows, KTO, {}) == [("row 1", wanted)]
    with pytest.raises(LoraError, match="label is false in all of 1 row"):
        compared_rows.take_better(rows[:1], KTO, {})
    pair = {"prompt": "q1", "chosen_response": "a", "rejected_response": "b"}
    dpo = recipe.name_objective("dpo")
    assert compared_rows.take_better([("", pair)], dpo, {}) == [("", wanted)]
    named = {"prompt": "q1", "good": "a", "bad": "b"}
    names = {"chosen": "good", "rejected": "bad"}
    assert compared_rows.take_better([("", named)], dpo, names) == [("", wanted)]


def test_rows_that_compare_nothing_stay_as_they_are() -> None:
    rows = [("", {"prompt": "q", "completion": "a"}), ("", {"prompt": "q"}), ("", 3)]
    for name in ("kto", "dpo"):
        assert compared_rows.take_better(rows, recipe.name_objective(name), {}) == rows
    [(_, bad)] = compared_rows.take_better([("", {"prompt": "q", "label": 3})], KTO, {})
    assert isinstance(bad, formats.BadRow)


def test_a_wanted_answer_is_asked_for_as_it_was_trained() -> None:
    """Alpaca's own template has a place for `input`; others have not."""
    row = {"instruction": "Sum up.", "input": "1, 2", "output": "3", "label": True}
    [(_, taken)] = compared_rows.take_better([("", row)], KTO, {})
    question = generate.make_question("", taken)
    for template in ("{{ x }}", "### Input:"):
        trained = formats.convert_unpaired(row, formats.uses_alpaca(template)).answer
        assert question.asked(template).messages == trained.messages[:1]
        assert question.convert(template).messages == trained.messages


def test_a_file_of_votes_is_read_by_who_was_trained_on_such(tmp_path: Path, capsys) -> None:
    votes = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 3 == 0} for n in range(6)]
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in votes))
    held = held_out.read_held_out(str(file), {}, {}, None, KTO)
    assert held.expected == ["a0", "a3"]
    assert "those whose answer is wanted, 2 of 6" in capsys.readouterr().err
    held = held_out.read_held_out(str(file), {}, {}, None)
    assert len(held.expected) == 6
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: label is false in 4 of 6 rows, whose answers count as expected" in said


@pytest.mark.parametrize("names", [{}, {"prompt": "conversations"}], ids=["guessed", "named"])
def test_pairs_of_a_turn_each_are_scored_by_the_chosen_one(names, tmp_path: Path) -> None:
    """Of a file of its own, too: with columns that training guessed no answer was expected."""
    asked = [{"from": "human", "value": "Which way?"}]
    told = {name: {"from": "gpt", "value": f"{name} way"} for name in formats.ANSWERS}
    row = {"conversations": asked} | told
    if not names:
        row = {"prompt": asked} | {f"{name}_response": told[name] for name in told}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    dpo = recipe.name_objective("dpo")
    held = held_out.read_held_out(str(tmp_path / "pairs.jsonl"), {}, names, None, dpo)
    assert (held.expected, held.bad) == (["chosen way"], [])


def test_the_next_command_after_votes_expects_the_wanted_answers(
    tiny: Path, tmp_path: Path
) -> None:
    votes = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 3 == 0} for n in range(6)]
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in votes))
    path = tmp_path / "r.yaml"
    path.write_text(
        f"objective: kto\nmodel: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {file}, eval_path: {file}}}\noutput_dir: {tmp_path / 'run'}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 6, save_strategy: 'no'}\n"
    )
    run.train(load.load_recipe(path, []))
    adapter = tmp_path / "run" / "adapter"
    commands = receipt.list_commands(adapter.parent, load.load_recipe(path, []))
    words = shlex.split(next(line for line in commands if line.startswith("lora evaluate ")))
    assert words[2:] == [str(adapter), "--data", str(file)]
    for data in (str(file), None):
        scored = score.scored_models.list_scored([str(adapter)], None, True, data)
        held = score._read_rows(Request(data), scored)
        assert held is not None and held.expected == ["a0", "a3"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_the_run_have_its_loss(kind: str, tiny: Path, tmp_path: Path) -> None:
    adapter = train(tiny, tmp_path, kind)
    said = (
        evaluate([adapter], general=False, out=tmp_path / "out")
        if kind == "a file of its own"
        else evaluate([adapter], general=False)
    )
    [model] = [each for each in said["models"] if each["kind"] == "adapter"]
    assert math.isclose(model["metrics"]["loss"]["value"], find_loss(adapter.parent), rel_tol=1e-5)
    if kind != "a file of its own":
        record = json.loads((adapter.parent / "record.json").read_text())
        assert said["data"]["rows"] == record["holdout"]["rows"]
        assert "held out of one.jsonl" in said["data"]["name"]


def test_other_data_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = train(tiny, tmp_path, "one file")
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(LoraError, match="has changed since") as caught:
        evaluate([adapter])
    assert "--data FILE" in str(caught.value.hint)
    (tmp_path / "one.jsonl").unlink()
    with pytest.raises(LoraError, match="cannot be read: .*one.jsonl"):
        evaluate([adapter])


def test_without_such_rows_data_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    adapter = train(tiny, tmp_path, "one file")
    for paths in ([tiny / "model"], [adapter.rename(tmp_path / "elsewhere")]):
        with pytest.raises(UsageError, match="nothing to score models on") as caught:
            evaluate(paths, sampling=Sampling(4, 0.0))
        assert "--data FILE" in str(caught.value.hint)
