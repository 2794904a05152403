"""The report that each run leaves: of a run that finished, failed, and began again.

Hermetic: trains the tiny model. Alone: pytest tests/report/test_after_training.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.test_page import check

ROWS = "data: {eval_path: %s, eval_split: 'train[:8]'}\n"
EVALUATED = (
    "training: {max_steps: 4, eval_strategy: steps, eval_steps: 2, logging_steps: 1, "
    "save_strategy: 'no'}\n"
)


def test_a_run_leaves_its_report(lora, write_recipe, tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(ROWS % (tiny / "eval.jsonl") + EVALUATED)
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    assert f"report in {tmp_path / 'run' / 'report.html'}" in done.stderr
    assert "warning" not in done.stderr
    _, said = check(tmp_path / "run" / "report.html")
    [run] = said["runs"]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert run["summary"]["steps"] == 4
    assert run["summary"]["train_loss"] == record["results"]["train_loss"]
    assert run["evaluations"]["count"] == 2
    assert {curve["name"] for curve in run["curves"]} >= {"loss", "eval_loss", "grad_norm"}
    assert run["data"]["rows"] == record["data"]["rows"]
    keys = {each["key"] for each in run["recipe"]}
    assert {"training.max_steps", "training.learning_rate", "data.path"} <= keys
    assert not keys & {"lora.r", "training.seed", "training.optim"}
    before = (tmp_path / "run" / "report.html").stat().st_mtime_ns
    again = lora("train", recipe)  # refused: what is there stays as it is
    assert "already holds a run (finished)" in again.stderr
    assert "report in" not in again.stderr
    assert (tmp_path / "run" / "report.html").stat().st_mtime_ns == before


def test_a_failed_run_leaves_one_and_begins_again(lora, write_recipe, tmp_path: Path) -> None:
    failing = write_recipe("training: {stop_on_loss_above: 0.001}\n")
    failed = lora("train", failing)
    assert failed.returncode == 1
    assert failed.stderr.rstrip().splitlines()[-1].startswith("hint: ")
    assert "error: stopped at step 1: the loss is " in failed.stderr
    _, said = check(tmp_path / "run" / "report.html")
    assert said["runs"][0]["state"] == "failed"
    done = lora("train", write_recipe())  # nothing was saved: the folder is free for another run
    assert done.returncode == 0, done.stderr
    _, said = check(tmp_path / "run" / "report.html")
    assert said["runs"][0]["state"] == "finished"


def test_a_report_of_somebody_elses_stays_and_is_no_failure(
    lora, write_recipe, tmp_path: Path
) -> None:
    recipe = write_recipe("training: {max_steps: 2, save_strategy: steps, save_steps: 1}\n")
    assert lora("train", recipe).returncode == 0
    (tmp_path / "run" / "report.html").write_text("mine")
    change = ("--resume", "--allow-changes", "training.max_steps", "--set", "training.max_steps=3")
    done = lora("train", recipe, *change)
    assert done.returncode == 0, done.stderr
    assert "report.html is there, and no report of lora's (lora report " in done.stderr
    assert (tmp_path / "run" / "report.html").read_text() == "mine"


@pytest.mark.parametrize("verb", ["runs", "report"])
def test_the_verbs_say_where_there_is_no_run(lora, verb: str, tmp_path: Path) -> None:
    done = lora(verb, tmp_path, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert "\nhint: lora runs" in done.stderr
