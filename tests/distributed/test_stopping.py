"""A run of several processes that is stopped goes on as the same run, on any number of processes, sharded or not.

Real processes on gloo, a random model of two layers; no network but the loopback. Alone: pytest tests/distributed/test_stopping.py
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.jobs import Job, find_packages, write_recipe

AUTO, DDP, FSDP, ZERO3 = "auto", "ddp", "fsdp", "deepspeed-zero3"
COPIES = "two copies"
"""Of what fsdp shards."""
SLOW = pytest.mark.slow
STEPS = 24


def train(folder: Path, tiny: Path, count: int, strategy: str, dropout: float, *more: str) -> Job:
    """Start a run of STEPS steps in `folder`."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, tiny, max_steps=STEPS, save_steps=100)
    settings = [f"lora.lora_dropout={dropout}", f"distributed.strategy={strategy}"]
    if strategy == COPIES:
        settings[1:] = ["distributed.strategy=fsdp", "distributed.replicas=2"]
    given = [word for setting in settings for word in ("--set", setting)]
    arguments = ["train", str(recipe), "--nproc", str(count), *given, *more]
    return Job(arguments, **find_packages(strategy))


def read_result(folder: Path) -> tuple[dict, list[float]]:
    """Return a run's adapter, and the loss of each step."""
    lines = [
        json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    return load_file(folder / "out" / "adapter" / "adapter_model.safetensors"), [
        line["loss"] for line in lines if "loss" in line
    ]


def stop_and_resume(
    folder: Path, tiny: Path, before: tuple[int, str], after: tuple[int, str], dropout: float
) -> str:
    """Stop a run amid its steps, and let it go on; return what it then said."""
    job = train(folder, tiny, *before, dropout)
    job.wait_for_steps(folder / "out", 6)
    job.process.send_signal(signal.SIGTERM)
    status, said, _ = job.end()
    assert status == 143, said
    assert "Traceback" not in said
    changed = (
        []
        if AUTO in before or before[1] == after[1]
        else ["--allow-changes", "distributed.strategy"]
    )
    status, said, _ = train(folder, tiny, *after, dropout, "--resume", *changed).end()
    assert status == 0, said
    return said


@pytest.mark.parametrize(
    "strategy", [DDP, *(pytest.param(each, marks=SLOW) for each in (FSDP, ZERO3, COPIES))]
)
def test_on_as_many_processes_bit_for_bit(strategy: str, tiny: Path, tmp_path: Path) -> None:
    """With dropout, whose numbers each process has of its own."""
    count = 4 if strategy == COPIES else 2
    status, said, _ = train(tmp_path / "whole", tiny, count, strategy, 0.1).end()
    assert status == 0, said
    if strategy != DDP:
        held, whole = map(float, re.search(r"holds ([\d.]+) of ([\d.]+) MB", said).groups())
        assert held < 0.55 * whole
    said = stop_and_resume(tmp_path / "stopped", tiny, (count, strategy), (count, strategy), 0.1)
    assert "warning: this run was saved" not in said
    (whole, losses), (resumed, again) = map(read_result, (tmp_path / "whole", tmp_path / "stopped"))
    assert losses == again
    assert len(losses) == STEPS
    assert all((whole[name] == resumed[name]).all() for name in whole)


@SLOW
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, AUTO), (1, AUTO)), ((1, AUTO), (2, AUTO)), ((1, AUTO), (2, FSDP)), ((2, DDP), (4, DDP)), ((2, FSDP), (1, FSDP)),
     ((2, FSDP), (4, FSDP)), ((2, DDP), (2, FSDP)), ((2, FSDP), (2, DDP)),
     ((2, ZERO3), (1, DDP)), ((1, DDP), (2, ZERO3)), ((2, ZERO3), (3, FSDP)), ((2, FSDP), (3, ZERO3))],
)  # fmt: skip
def test_on_another_number_of_processes_to_rounding(
    before: tuple[int, str], after: tuple[int, str], tiny: Path, tmp_path: Path
) -> None:
    status, said, _ = train(tmp_path / "whole", tiny, *before, 0.0).end()
    assert status == 0, said
    said = stop_and_resume(tmp_path / "stopped", tiny, before, after, 0.0)
    if before[0] != after[0]:
        assert f"this run was saved by {before[0]} processes and goes on with {after[0]}" in said
    (whole, losses), (resumed, again) = map(read_result, (tmp_path / "whole", tmp_path / "stopped"))
    assert max(abs(one - other) for one, other in zip(losses, again, strict=True)) <= 1e-5
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) <= 1e-4
