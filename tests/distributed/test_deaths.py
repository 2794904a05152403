"""One process of several ends: all do, soon, with one message, and the run goes on from its checkpoint.

Real processes on gloo, a random model of two layers; no network but the loopback. Alone: pytest tests/distributed/test_deaths.py
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import Job, count_steps, find_packages, write_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "who",
    ["rank 1", pytest.param("rank 0", marks=SLOW), pytest.param("launcher", marks=SLOW)],
)
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed-zero3", marks=SLOW)])
def test_a_killed_process_ends_the_job(strategy: str, who: str, tiny: Path, tmp_path: Path) -> None:
    packages, chosen = find_packages(strategy), ["--set", f"distributed.strategy={strategy}"]
    recipe = str(write_recipe(tmp_path, tiny))
    job = Job(["train", recipe, "--nproc", "2", *chosen], **packages)
    job.wait_for_steps(tmp_path / "out", 8)
    if who == "launcher":
        job.process.kill()
    else:
        job.ranks[int(who[-1])].kill()
    status, said, seconds = job.end()
    assert seconds < 30  # 1 to 3 on a machine with nothing else to do
    if who == "launcher":
        assert status == -signal.SIGKILL
    else:
        assert status == 1, said
        assert said.count("error: ") == 1, said
        assert f"error: process {who[-1]} of this run ended by SIGKILL" in said
    assert "Traceback" not in said
    shorter = ["--set", "training.max_steps=12", "--allow-changes", "training.max_steps"]
    job = Job(["train", recipe, "--resume", "--nproc", "2", *chosen, *shorter], **packages)
    status, said, _ = job.end()
    assert status == 0, said
    assert count_steps(tmp_path / "out") == 13  # each step once, and the end


def test_a_signal_to_one_rank_is_all_of_theirs(tiny: Path, tmp_path: Path) -> None:
    job = Job(["train", str(write_recipe(tmp_path, tiny)), "--nproc", "2"])
    job.wait_for_steps(tmp_path / "out", 3)
    os.kill(job.process.pid, signal.SIGUSR1)
    job.wait_until(lambda: bool(list((tmp_path / "out").glob("checkpoint-*"))))
    job.ranks[1].send_signal(signal.SIGTERM)
    status, said, _ = job.end()
    assert status == 143, said
    assert "SIGUSR1: saved checkpoint-" in said
    assert said.count("stopped; from step ") == 1, said


def test_a_signal_that_srun_gives_to_all_and_the_launcher_passes_on_is_one(
    tiny: Path, tmp_path: Path
) -> None:
    job = Job(["train", str(write_recipe(tmp_path, tiny)), "--nproc", "2"])
    job.wait_for_steps(tmp_path / "out", 3)
    for rank in job.ranks.values():
        rank.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    status, said, _ = job.end()
    assert status == 143, said
    assert list((tmp_path / "out").glob("checkpoint-*")), said


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed-zero3", marks=SLOW)])
def test_an_error_of_one_rank_is_the_jobs(strategy: str, tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, learning_rate=1e30)
    arguments = ["train", str(recipe), "--nproc", "2", "--set", f"distributed.strategy={strategy}"]
    status, said, _ = Job(arguments, **find_packages(strategy)).end()
    assert status == 1, said
    assert said.count("error: stopped at step ") == 1, said
    assert said.count("hint: ") == 1
    assert '"status": "failed"' in (tmp_path / "out" / "record.json").read_text()


RUN_OUT = """
import os, pathlib, torch
backward, calls, done = torch.Tensor.backward, [], pathlib.Path({done!r})
def run_out(*arguments, **named):
    calls.append(1)
    if rank == "1" and len(calls) == 8 and not done.exists():
        done.touch()
        raise torch.OutOfMemoryError("out of memory")
    return backward(*arguments, **named)
rank, torch.Tensor.backward = os.environ.get("RANK"), run_out
"""


@SLOW
@pytest.mark.parametrize("goes_on", [True, False])
def test_memory_that_runs_out_in_one_process(goes_on: bool, tiny: Path, tmp_path: Path) -> None:
    """All are started again from the last checkpoint, with the same steps in smaller pieces."""
    text = RUN_OUT.format(done=str(tmp_path / "done"))
    (tmp_path / "sitecustomize.py").write_text(text)
    recipe = write_recipe(tmp_path, tiny, max_steps=9, save_steps=4, packing=False)
    on_oom = "reduce" if goes_on else "stop"
    arguments = ["train", str(recipe), "--nproc", "2", "--set", f"training.on_oom={on_oom}"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    status, said, _ = Job(arguments, PYTHONPATH=path).end()
    if not goes_on:
        assert status == 1
        assert "training.on_oom=reduce does so by itself" in said
        return
    assert status == 0, said
    assert "out of memory: batches of 8, 1 per step become batches of 4, 2 per step" in said
    assert "error: " not in said
    step = int(said.partition("all processes go on from step ")[2].partition("\n")[0])
    assert f"resuming from {tmp_path / 'out'}/checkpoint-{step}" in said
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [each["step"] for each in record["reduced"]] == [step] == [4]
    assert record["status"] == "finished"
    assert count_steps(tmp_path / "out") == 10  # each step once, and the end


@pytest.mark.slow
def test_a_terminal_that_goes_does_not_end_what_nohup_started(tiny: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for those it starts
    try:
        job = Job(["train", str(write_recipe(tmp_path, tiny, max_steps=40)), "--nproc", "2"])
    finally:
        signal.signal(signal.SIGHUP, before)
    job.wait_for_steps(tmp_path / "out", 3)
    job.process.send_signal(signal.SIGHUP)
    status, said, _ = job.end()
    assert status == 0, said
    assert "trained 40 steps" in said
