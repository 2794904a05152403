"""The best step becomes the adapter, a run that gets worse stops, and goes on where it is asked to;
resumed and continued runs are the uninterrupted one.

Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_best_step.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from lora_cli.common.errors import LoraError
from lora_cli.merge import merge
from lora_cli.recipe import load
from lora_cli.train import objectives, resume
from lora_cli.train import run as train

WORSE = (
    "training: {{num_train_epochs: {epochs}, learning_rate: 1.0e-2, lr_scheduler_type: {schedule}, "
    "warmup_steps: 0, per_device_train_batch_size: 8, max_length: 64, logging_steps: 2, "
    "eval_strategy: steps, eval_steps: 2, save_steps: 3{more}}}\n"
)
LOSSES = [9.0, 5.0, 6.0, 7.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path):
    """A function that loads a recipe of 24 rows, of which 8 are held out: two steps an epoch."""

    def made(
        name: str, *sets: str, epochs: int = 8, schedule: str = "constant", more: str = ""
    ) -> object:
        path = tmp_path / "r.yaml"
        path.write_text(
            f"model: {{name_or_path: {tiny / 'model'}}}\n"
            f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 24, eval_rows: 8}}\n"
            + WORSE.format(epochs=epochs, schedule=schedule, more=more)
            + f"output_dir: {tmp_path / name}\n"
        )
        return load.load_recipe(path, list(sets))

    return made


@pytest.fixture
def scripted(monkeypatch) -> None:
    """Evaluations say what LOSSES has, in its order, whatever the model is."""
    evaluate = objectives.WatchedSFTTrainer.evaluation_loop

    def loop(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = LOSSES[self.state.global_step // 2 - 1]
        return output

    monkeypatch.setattr(objectives.WatchedSFTTrainer, "evaluation_loop", loop)


def record(folder: Path) -> dict[str, object]:
    return json.loads((folder / "record.json").read_text())


def metrics(folder: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without what is measured by a clock."""
    clocks = ("per_second", "runtime", "memory", "total_flos")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if not any(word in key for word in clocks)}
        for line in lines
    ]


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def test_the_best_step_is_what_is_kept_and_merged(recipe, scripted, tmp_path: Path, capsys) -> None:
    adapter = train.train(recipe("run"))
    found = record(tmp_path / "run")
    assert found["kept"] == {
        "which": "best", "step": 10, "metric": "eval_loss", "value": 4.0,
        "last_step": 16, "last_value": 8.0, "why": "",
    }  # fmt: skip
    assert found["holdout"]["rows"] == 8
    assert weights(adapter) == weights(tmp_path / "run" / "checkpoint-10")
    said = capsys.readouterr().err
    assert "kept step 10, the best: eval_loss 4.0000; the last, 16: eval_loss 8.0000\n" in said
    merge.merge(adapter, tmp_path / "merged")  # compared with what trained
    told = json.loads((tmp_path / "merged" / "lora_record.json").read_text())["parent"]
    assert told["kept"]["step"] == 10


def test_a_metric_that_is_not_defined_once_ends_no_run(
    recipe, scripted, monkeypatch, tmp_path: Path, capsys
) -> None:
    """As a correlation where all values are one: neither the best step nor a schedule that goes by
    evaluations looks at that one. The loss is 9, undefined, 6, 7: after 6 is a plateau."""
    evaluate = objectives.WatchedSFTTrainer.evaluation_loop

    def loop(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        if self.state.global_step == 4:
            del output.metrics["eval_loss"]
        return output

    monkeypatch.setattr(objectives.WatchedSFTTrainer, "evaluation_loop", loop)
    more = ", lr_scheduler_kwargs: {patience: 0, factor: 0.5}, metric_for_best_model: loss"
    train.train(recipe("run", epochs=4, schedule="reduce_lr_on_plateau", more=more))
    assert "this one does not count" in capsys.readouterr().err
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "learning_rate" in line]
    assert rates[-1] == 0.01
    kept = record(tmp_path / "run")["kept"]
    assert (kept["step"], kept["value"]) == (6, 6.0)


def test_a_run_that_ends_before_its_first_evaluation_says_so(
    recipe, tmp_path: Path, capsys
) -> None:
    train.train(recipe("run", more=", eval_delay: 100, early_stopping_patience: 1", epochs=2))
    assert "warning: nothing was evaluated: the last step is kept" in capsys.readouterr().err
    assert record(tmp_path / "run").get("kept") is None


def test_the_last_step_is_kept_where_it_is_asked_for(recipe, scripted, tmp_path: Path) -> None:
    adapter = train.train(recipe("run", "training.keep=last"))
    kept = record(tmp_path / "run")["kept"]
    assert (kept["which"], kept["step"], kept["value"]) == ("last", 16, 8.0)
    assert weights(adapter) == weights(tmp_path / "run" / "checkpoint-16")


def test_a_run_that_gets_worse_stops_and_goes_on_when_asked(
    recipe, scripted, tmp_path: Path, capsys
) -> None:
    """More patience makes it the run that had it from the start, to the bit."""
    stopped = train.train(recipe("stopped", more=", early_stopping_patience: 2"))
    kept = record(tmp_path / "stopped")["kept"]
    assert (kept["step"], kept["last_step"]) == (4, 8)
    assert kept["why"] == "2 evaluations in a row were no better than the best before them"
    assert "stopped early at step 8: 2 evaluations" in capsys.readouterr().err
    again = recipe("stopped", more=", early_stopping_patience: 2")
    with pytest.raises(LoraError, match="is finished"):
        train.train(again, resume=True)
    patient = "training.early_stopping_patience=3"
    whole = train.train(recipe("whole", patient, more=", early_stopping_patience: 2"))
    assert record(tmp_path / "whole")["kept"]["step"] == 10
    continued = train.train(
        recipe("stopped", patient, more=", early_stopping_patience: 2"), resume=True
    )
    assert continued == stopped
    assert weights(continued) == weights(whole)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert "learning rates of a" not in capsys.readouterr().err


def kill_in_step(monkeypatch, number: int) -> None:
    inner = objectives.WatchedSFTTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(objectives.WatchedSFTTrainer, "training_step", step)


@pytest.mark.parametrize(("at", "keep"), [(4, "best"), (5, "best"), (7, "best"), (6, "last")])
def test_patience_is_counted_on_after_an_interruption(
    recipe, scripted, tmp_path: Path, monkeypatch, capsys, at: int, keep: str
) -> None:
    """The step that ends it all counts, too: what was interrupted just then trains no more. Where
    the last step is kept, the best one, 4, has no checkpoint."""
    more = f", early_stopping_patience: 2, keep: {keep}"
    whole = train.train(recipe("whole", more=more))
    with monkeypatch.context() as patch:
        kill_in_step(patch, at)
        with pytest.raises(SystemExit):
            train.train(recipe("stopped", more=more))
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir() == (keep == "best")
    capsys.readouterr()
    resumed = train.train(recipe("stopped", more=more), resume=True)
    assert f"resuming from {tmp_path / 'stopped'}/checkpoint-{at + 1}" in capsys.readouterr().err
    assert weights(resumed) == weights(whole)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert record(tmp_path / "stopped")["kept"] == record(tmp_path / "whole")["kept"]


def test_a_run_killed_between_its_last_evaluation_and_its_end_trains_no_more(
    recipe, scripted, tmp_path: Path, monkeypatch
) -> None:
    more = ", early_stopping_patience: 2"
    whole = train.train(recipe("whole", more=more))

    def die(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.Resumable, "_load_best_model", die)
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe("stopped", more=more))
    assert train.train(recipe("stopped", more=more), resume=True)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "stopped" / "adapter") == weights(whole)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_is_continued(recipe, scripted, tmp_path: Path, capsys, schedule) -> None:
    """With an even learning rate as the longer run from its start, to the bit; else that is said."""
    train.train(recipe("short", epochs=3, schedule=schedule))
    capsys.readouterr()
    longer = "training.num_train_epochs=6"
    continued = train.train(recipe("short", longer, epochs=3, schedule=schedule), resume=True)
    said = capsys.readouterr().err
    whole = train.train(recipe("whole", epochs=6, schedule=schedule))
    exact = schedule == "constant"
    assert (weights(continued) == weights(whole)) == exact
    assert ("not what it would have been from its first step" in said) == (not exact)
    assert (tmp_path / "short" / "adapter-6").is_dir()


def test_a_damaged_best_step_is_named_and_the_last_one_can_be_taken(
    recipe, scripted, tmp_path: Path, monkeypatch, capsys
) -> None:
    load_best = resume.Resumable._load_best_model

    def damage(self) -> None:
        os.truncate(tmp_path / "run" / "checkpoint-10" / "adapter_model.safetensors", 100)
        load_best(self)

    with monkeypatch.context() as patch:
        patch.setattr(resume.Resumable, "_load_best_model", damage)
        with pytest.raises(LoraError, match="the best model, .*cannot be loaded") as caught:
            train.train(recipe("run"))
    assert caught.value.hint == "--resume --set training.keep=last takes the last one instead"
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    capsys.readouterr()
    adapter = train.train(recipe("run", "training.keep=last"), resume=True)
    assert f"resuming from {tmp_path / 'run'}/checkpoint-16\n" in capsys.readouterr().err
    assert record(tmp_path / "run")["kept"]["which"] == "last"
    assert adapter.is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (", load_best_model_at_end: true", "use training.keep: best"),
        (", early_stopping_threshold: 0.1", "has no effect"),
        (", early_stopping_patience: 0", "early_stopping_patience"),
        (", keep: first", "keep"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe, more: str, message: str) -> None:
    with pytest.raises(LoraError) as caught:
        recipe("run", more=more)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_a_lower_perplexity_is_better(recipe, tmp_path: Path) -> None:
    """transformers takes what is not called loss to be better where it is greater."""
    train.train(recipe("run", epochs=3, more=", metric_for_best_model: perplexity"))
    values = {
        line["step"]: line["eval_perplexity"]
        for line in metrics(tmp_path / "run")
        if "eval_perplexity" in line
    }
    kept = record(tmp_path / "run")["kept"]
    assert kept["metric"] == "eval_perplexity"
    assert values[kept["step"]] == kept["value"] == min(values.values())


@pytest.mark.parametrize("best", [True, False])
def test_a_run_of_a_version_without_these_keys_goes_on(
    recipe, scripted, tmp_path: Path, monkeypatch, best: bool
) -> None:
    """It kept what its recipe said by another name."""
    keep = f"training.keep={'best' if best else 'last'}"
    with monkeypatch.context() as patch:
        kill_in_step(patch, 5)
        with pytest.raises(SystemExit):
            train.train(recipe("run", keep))
    file = tmp_path / "run" / "record.json"
    written = json.loads(file.read_text())
    training = written["recipe"]["training"]
    for key in [key for key in training if key.startswith(("early_", "sample_", "keep"))]:
        del training[key]
    training["load_best_model_at_end"] = best
    file.write_text(json.dumps(written))
    train.train(recipe("run", keep), resume=True)
    found = record(tmp_path / "run")
    assert found["kept"]["step"] == (10 if best else 16)
    assert "changed" not in found
