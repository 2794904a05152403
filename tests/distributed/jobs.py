"""Jobs of several processes: the real command, started and watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 120.0
"""Seconds for what takes ten on a machine with nothing else to do."""


DEEPSPEED = Path(__file__).parent.parent.parent / "build" / "deepspeed"


def find_packages(strategy: str) -> dict[str, str]:
    """Return the environment in which a strategy's own packages are found; they stand apart from
    all others."""
    if not strategy.startswith("deepspeed"):
        return {}
    assert (DEEPSPEED / "deepspeed").is_dir(), "DeepSpeed is not there: make build/deepspeed"
    paths = [
        DEEPSPEED.parent.parent,
        DEEPSPEED,
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    return {"PYTHONPATH": os.pathsep.join(filter(None, map(str, paths)))}


def write_recipe(folder: Path, tiny: Path, method: str = "lora", **training: Any) -> Path:
    """Write a recipe whose run is `folder/out`; it logs each step."""
    given = {
        "max_length": 64,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 400,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": 2,
        **training,
    }
    path = folder / "r.yaml"
    path.write_text(
        json.dumps(
            {
                "method": method,
                "output_dir": str(folder / "out"),
                "model": {"name_or_path": str(tiny / "model")},
                "data": {"path": str(tiny / "train.jsonl"), "max_rows": 45},
                "lora": {"r": 8, "lora_dropout": 0.1},
                "training": given,
            }
        )
    )
    return path


class Job:
    """`lora` with some arguments, in processes of its own."""

    def __init__(
        self, arguments: Sequence[str], folder: Path | None = None, **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.ranks: dict[int, psutil.Process] = {}

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the job does."""
        until = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, "it does not happen"
            time.sleep(0.01)
        self.ranks |= find_ranks(psutil.Process(self.process.pid))

    def wait_for_steps(self, folder: Path, steps: int) -> None:
        """Wait until so many steps are in the run's metrics."""
        self.wait_until(lambda: count_steps(folder) >= steps)

    def end(self, patience: float = PATIENCE) -> tuple[int, str, float]:
        """Return status, what was said, and seconds from now to the end; nothing of it is left."""
        began = time.monotonic()
        _, said = self.process.communicate(timeout=patience)
        seconds = time.monotonic() - began
        gone, alive = psutil.wait_procs(self.ranks.values(), timeout=5)
        assert not alive, f"left: {alive}, {said}"
        return self.process.returncode, said, seconds


def count_steps(folder: Path) -> int:
    """Return how many steps the run in a folder has logged."""
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def find_ranks(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Return the processes that a launcher has started, by rank."""
    found = {}
    for child in launcher.children():
        with suppress_gone():
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return found


@contextmanager
def suppress_gone() -> Iterator[None]:
    """Nothing is wrong with a process that has ended meanwhile."""
    with suppress(psutil.Error):
        yield
