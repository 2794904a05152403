"""A run that is stopped anywhere and resumed is the run that was not: adapter and records, bit for
bit.

Methods, trainers, packing, streams and the rest are combined so that every two values meet in some
run (`rows`). Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_resume.py
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.common import LoraError
from lora_cli.recipe import load
from lora_cli.train import checkpoints, run, trial
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Boundaries
from lora_cli.train.trainers import Watched
from tests.runs import KilledError, read_adapter, read_metrics

FACTORS: dict[str, list[str]] = {
    "method": ["qdora", "qlora", "dora", "lora"],
    "packing": ["step", "dataset", "false"],
    "trainer": ["sft", "trainer"],
    "dtype": ["float32", "bfloat16"],
    "dropout": ["0.1", "0.0"],
    "gradient_checkpointing": ["true", "false"],
    "dataloader_num_workers": ["0", "1"],
    "rows": ["random", "group_by_length", "stream"],
    "gradient_accumulation_steps": ["2", "1"],
}
NAMES = list(FACTORS)
POINTS = ["accumulation", "at once", "last step", "save", "evaluation", "edge"]
"""Where a run is stopped, taken in turn; `tests/torture/kill.py` stops all methods everywhere."""


def possible(row: dict[str, str]) -> bool:
    """TRL's packing is SFTTrainer's; of a stream it is not the data set's."""
    return row["packing"] != "dataset" or (row["trainer"] == "sft" and row["rows"] == "random")


def covering() -> list[dict[str, str]]:
    """Few combinations in which every two values that can meet do: greedily, the one with most new
    pairs first."""

    def pairs(row: dict[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        return set(itertools.combinations(row.items(), 2))

    every = [
        row
        for values in itertools.product(*FACTORS.values())
        if possible(row := dict(zip(NAMES, values)))
    ]
    missing, chosen = set().union(*map(pairs, every)), []
    found = [(row, pairs(row)) for row in every[::7]]  # a sample is enough to choose from
    while missing:
        row, its = max(found, key=lambda each: len(each[1] & missing))
        if not its & missing:
            found = [(row, pairs(row)) for row in every]
            continue
        chosen.append(row)
        missing -= its
    return chosen


COMBINATIONS = [
    {"point": POINTS[number % len(POINTS)], **row} for number, row in enumerate(covering())
]


def recipe_text(row: dict[str, str], tiny: Path, folder: Path) -> str:
    stream = row["rows"] == "stream"
    return (
        f"method: {row['method']}\ntrainer: {row['trainer']}\noutput_dir: {folder}\n"
        f"model: {{dtype: {row['dtype']}}}\nlora: {{r: 4, lora_dropout: {row['dropout']}}}\n"
        f"data: {{max_rows: 8, eval_path: {tiny / 'eval.jsonl'}, eval_split: 'train[:4]'"
        + (", streaming: true, shuffle_buffer: 5}\n" if stream else "}\n")
        + f"training: {{packing: {row['packing']}, gradient_checkpointing: {row['gradient_checkpointing']}, "
        f"gradient_accumulation_steps: {row['gradient_accumulation_steps']}, max_length: 64, "
        f"dataloader_num_workers: {row['dataloader_num_workers']}, logging_steps: 2, "
        + (f"train_sampling_strategy: {row['rows']}, " if row["rows"] == "group_by_length" else "")
        + "max_steps: 7, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 3, "
        "per_device_eval_batch_size: 2, eval_strategy: epoch, eval_on_start: true}\n"
    )


def interrupt(patch: pytest.MonkeyPatch, row: dict[str, str]) -> None:
    """Let the next run be stopped: by SIGTERM amid a step or an evaluation, or killed."""
    patch.setattr(trial, "try_training", lambda recipe: None)  # it makes steps, too
    calls, point = itertools.count(1), row["point"]
    # a micro-batch of step 5 or 6, in the midst of an epoch that is not the first
    twice = row["gradient_accumulation_steps"] == "2"
    batch = (5 if row["packing"] == "step" else 9) if twice else 6

    def at(
        owner: Any, name: str, number: int, how: Callable[[], None], when: Any = lambda *_: True
    ) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            if when(*args) and next(calls) == number:
                how()
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def kill() -> None:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody cleans up after a kill
        raise KilledError

    if point == "save":
        at(checkpoints, "_seal_folder", 2, kill)  # of step 6
    elif point == "at once":
        at(Watched, "training_step", batch, kill)
    elif point == "last step":
        at(
            Watch,
            "on_step_end",
            1,
            terminate,
            lambda watch, args, state, *_: float(state.epoch).is_integer(),
        )
    elif point == "edge":
        at(Boundaries, "on_epoch_end", 1, terminate)
    else:  # there are two batches to evaluate, and an evaluation at the start
        name, number = (
            ("training_step", batch) if point == "accumulation" else ("prediction_step", 3)
        )
        at(Watched, name, number, terminate)


def facts(folder: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The adapter's bytes, and metrics.jsonl without what the clock decides."""
    return read_adapter(folder), read_metrics(folder)


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "-".join(row.values()))
def test_a_stopped_run_resumes_to_the_same_bytes(
    row: dict[str, str], write_recipe, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    run.train(load.load_recipe(write_recipe(recipe_text(row, tiny, tmp_path / "whole"))))
    recipe = load.load_recipe(write_recipe(recipe_text(row, tiny, tmp_path / "stopped")))
    with monkeypatch.context() as patch:
        interrupt(patch, row)
        with pytest.raises((SystemExit, KilledError)):
            run.train(recipe)
    run.train(recipe, resume=True)
    assert facts(tmp_path / "stopped") == facts(tmp_path / "whole")


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes() -> None:
    """`make torture` kills 500 of them."""
    torture = Path(__file__).parent.parent / "torture" / "kill.py"
    done = subprocess.run(
        [sys.executable, str(torture), "--kills", "12", "--methods", "lora", "qdora"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("all resumed, all bitwise equal")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps() -> None:
    """`make torture` takes 20 000 of them."""
    torture = Path(__file__).parent.parent / "torture" / "rss.py"
    done = subprocess.run(
        [sys.executable, str(torture), "--steps", "900", "--after", "300"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("900 steps: +")


def test_a_run_goes_on_that_was_begun_before_a_key_was_there(write_recipe, tmp_path: Path) -> None:
    recipe = load.load_recipe(
        write_recipe("training: {max_steps: 4, save_strategy: steps, save_steps: 2}\n")
    )
    folder = run.train(recipe).parent
    record = json.loads((folder / "record.json").read_text())
    assert record["recipe"]["training"].pop("packed_length") == 128
    old = json.dumps(record | {"status": "interrupted"})
    for given in (recipe, load.load_recipe(folder / "recipe.yaml")):
        (folder / "record.json").write_text(old)
        run.train(given, resume=True)
    (folder / "record.json").write_text(old)
    other = recipe.replace("auto", {"training": {"packed_length": 64}})
    with pytest.raises(LoraError, match="training.packed_length 128 -> 64"):
        run.train(other, resume=True)


def test_two_learning_rates_for_embeddings_alone(write_recipe) -> None:
    text = "lora: {target_modules: [embed_tokens]}\ntraining: {loraplus_lr_ratio: 16}\n"
    folder = run.train(load.load_recipe(write_recipe(text)))
    assert (folder / "adapter_model.safetensors").is_file()
