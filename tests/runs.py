"""What runs leave, read without what the clock decides; and runs that are stopped or trained by two
processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_cli.recipe import Recipe, load_recipe
from lora_cli.train.trainers import Watched
from tests.distributed.jobs import find_packages

CLOCK = ("runtime", "per_second", "peak_memory")


class KilledError(BaseException):
    """Stands for kill -9: nothing of ours may handle it."""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(word in key for word in CLOCK)}
        for line in lines
    ]


def read_steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder) if "loss" in line]


def read_adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def write_comparing_recipe(
    folder: Path, tiny: Path, name: str, objective: str, rows: Path, overrides: Sequence[str]
) -> Recipe:
    """Write and load a recipe of five steps of four rows each; its run is `folder/name`."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"objective: {objective}\noutput_dir: {folder / name}\n"
        f"model: {{name_or_path: {tiny / 'model'}}}\ndata: {{path: {rows}}}\nlora: {{r: 4}}\n"
        "training: {max_steps: 5, per_device_train_batch_size: 4, logging_steps: 1, "
        "learning_rate: 1e-3, warmup_steps: 0, save_strategy: steps, save_steps: 2}\n"
    )
    return load_recipe(path, overrides)


def stop_once(
    train: Callable[..., Path], given: Sequence[str], how: str, patch: pytest.MonkeyPatch
) -> Path:
    """Train with accumulation of two, stopped amid step 5 by `kill` or `signal`, and go on."""
    own, calls = Watched.training_step, [0]

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 10:  # amid step 5
            if how == "kill":
                raise KilledError
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*args, **kwargs)

    with patch.context() as patched:
        patched.setattr(Watched, "training_step", stop)
        with pytest.raises((SystemExit, KilledError)):
            train("stopped", *given)
    return train("stopped", *given, resume=True)


def train_by_two(recipe: Path, strategy: str, given: Sequence[str]) -> None:
    """Train a recipe by two processes."""
    sets = [word for each in given for word in ("--set", each)]
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe), "--nproc", "2", *sets]
    done = subprocess.run(
        [*command, "--set", f"distributed.strategy={strategy}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **find_packages(strategy)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def compare_metrics(one: Path, two: Path, names: Sequence[str], near: float) -> None:
    """Compare the numbers of these names in two runs' metrics, line by line."""
    mine, others = read_metrics(one), read_metrics(two)
    assert len(mine) == len(others)
    for line, other in zip(mine, others):
        for name in names:
            if name in line:
                assert other[name] == pytest.approx(line[name], rel=1e-3, abs=near)
