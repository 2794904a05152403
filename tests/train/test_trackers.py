"""Trackers get the recipe, the samples and the best step; one that fails stops nothing.

Hermetic: the tiny model, tensorboard's own files, CPU. Alone: pytest tests/train/test_trackers.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from lora_cli.recipe import load
from lora_cli.train import run as train
from lora_cli.train import trackers


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path):
    """A run of four steps that is evaluated and told to tensorboard."""
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 24, eval_rows: 8}}\n"
        "training: {max_steps: 4, per_device_train_batch_size: 8, max_length: 64, logging_steps: 1,\n"
        "  eval_strategy: steps, eval_steps: 2, report_to: tensorboard}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return load.load_recipe(path)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(next((folder / "runs").iterdir())))
    found.Reload()
    return found


def text(events: EventAccumulator, name: str) -> list[str]:
    values = events.Tensors(f"{name}/text_summary")
    return [value.tensor_proto.string_val[0].decode() for value in values]


def test_a_tracker_gets_recipe_and_end(recipe, tmp_path: Path) -> None:
    train.train(recipe)
    events = read(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    kept = record["kept"]
    assert events.Scalars("final/best_step")[0].value == kept["step"]
    assert events.Scalars("final/best_loss")[0].value == pytest.approx(kept["value"], rel=1e-6)
    [said] = text(events, "recipe")
    assert "max_rows: 24" in said and "learning_rate: 0.0002" in said
    for name in ("loss", "tokens_per_second", "peak_memory_gb"):
        told = [each.value for each in events.Scalars(f"train/{name}")]
        assert told == pytest.approx([line[name] for line in lines if name in line], rel=1e-6)
        assert len(told) == 4
    # what the receipt says, of which the last steps may have taken more
    [peak] = events.Scalars("final/peak_memory_gb")
    assert (
        told[-1] <= peak.value * 1.001 and peak.value <= record["results"]["peak_memory_gb"] * 1.001
    )
    assert events.Scalars("final/tokens")[0].value == lines[-1]["num_input_tokens_seen"]


def test_a_tracker_gets_the_mean_loss_of_a_resumed_run(recipe, tmp_path: Path) -> None:
    """Of all its steps: Trainer's own is that of the steps since it was resumed."""
    train.train(recipe)
    again = recipe.replace(recipe.trainer, {"training": {"max_steps": 6}})
    train.train(again, resume=True, allowed=["training.max_steps"])
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    folders = sorted((tmp_path / "run" / "runs").iterdir())
    events = EventAccumulator(str(folders[-1]))
    events.Reload()
    told = events.Scalars("train/train_loss")[-1].value
    assert told == pytest.approx(record["results"]["train_loss"], rel=1e-6)


def test_samples_are_told_once_and_as_text(recipe, tmp_path: Path, monkeypatch) -> None:
    """Whatever wrote them; here it is the test, as steps are logged."""
    on_log = trackers.Tracker.on_log

    def log(self, args, state, control, **given):
        with (tmp_path / "run" / "samples.jsonl").open("a") as file:
            sample = {"step": state.global_step, "prompt": "a # b\nc", "answer": "<b>\u2028\n"}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        on_log(self, args, state, control, **given)

    monkeypatch.setattr(trackers.Tracker, "on_log", log)
    train.train(recipe)
    said = text(read(tmp_path / "run"), "samples")
    lines = (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]
    assert len(said) == len(lines) >= 4
    assert said[0] == "    > a # b\n    > c\n    <b>\n    "


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_is_left_out(
    recipe, tmp_path: Path, capsys, monkeypatch, event
) -> None:
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(event)
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    assert train.train(recipe).is_dir()
    assert len(calls) == 1
    said = capsys.readouterr().err
    assert said.count("training.report_to: tensorboard gets nothing more of this run") == 1


def test_an_interruption_is_no_failure_of_a_tracker(recipe, tmp_path: Path, monkeypatch) -> None:
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorBoardCallback, "on_log", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "interrupted"
