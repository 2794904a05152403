"""Whether the same run twice, and a run that is stopped and resumed, come to the same adapter; and
whether SIGTERM stops one in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from gpu_parts import models, runs
from gpu_parts.part import Bench, Case, Figures
from gpu_parts.report import Column

TITLE = "The same run again, and resumed: 10 steps, 5 and 5"
COLUMNS = (
    Column("the same twice, bit for bit", "again_same"),
    Column("off", "again_off", 9),
    Column("resumed, bit for bit", "resumed_same"),
    Column("off", "resumed_off", 9),
    Column("losses off", "loss", 6),
)
STEPS, STOPPED = 10, 5
CHANGES: dict[str, Figures] = {
    "lora": {},
    "lora, dropout": {"lora": {"lora_dropout": 0.1}},
    "qlora": {"method": "qlora"},
    "dora": {"method": "dora"},
    "lora, full_determinism": {"training": {"full_determinism": True}},
}
WAIT = 60
"""Seconds within which a process that is told to end has ended."""


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    cases = {name: Case(partial(compare, name), 40) for name in CHANGES}
    determined = cases.pop("lora, full_determinism")
    # the last one, as it changes how this process computes
    return cases | {"SIGTERM": Case(stop_process, 90), "lora, full_determinism": determined}


def _make_recipe(bench: Bench, name: str, changes: Figures, steps: int = STEPS) -> Path:
    training = {"max_steps": steps, "per_device_train_batch_size": 8, "max_length": 128}
    basis: Figures = {"data": {"max_rows": 200}, "training": training | {"learning_rate": 2e-3}}
    for section, values in changes.items():
        basis[section] = basis.get(section, {}) | values if isinstance(values, dict) else values
    folder = runs.make_folder(bench, name)
    return runs.write_recipe(folder, bench.tiny / "model", bench.tiny / "train.jsonl", basis)


def compare(name: str, bench: Bench) -> Figures:
    """Train twice, and once with a stop in between; return how far the adapters are apart."""
    whole, again, parted = (
        _make_recipe(bench, f"{name} {which}", CHANGES[name])
        for which in ("once", "twice", "parted")
    )
    losses = runs.train(whole, runs.Observer(bench.clock))
    runs.train(again, runs.Observer(bench.clock))
    try:
        runs.train(parted, runs.Observer(bench.clock, stop_after=STOPPED))
    except SystemExit as ended:
        if ended.code != 128 + signal.SIGTERM:
            raise
    else:
        raise RuntimeError("SIGTERM did not stop the run")
    resumed = runs.train(parted, runs.Observer(bench.clock), "--resume")
    if len(resumed) != STEPS:
        raise RuntimeError(f"the resumed run has recorded {len(resumed)} steps, not {STEPS}")
    again_off, resumed_off = (_measure_difference(whole, other) for other in (again, parted))
    return {
        "again_same": again_off == 0,
        "again_off": again_off,
        "resumed_same": resumed_off == 0,
        "resumed_off": resumed_off,
        "loss": max(abs(one["loss"] - other["loss"]) for one, other in zip(losses, resumed)),
    }


def _measure_difference(one: Path, other: Path) -> float:
    """Return the largest difference of two runs' adapters."""
    first, second = (
        load_file(recipe.parent / "run/adapter/adapter_model.safetensors")
        for recipe in (one, other)
    )
    if first.keys() != second.keys():
        raise RuntimeError("the adapters have other tensors")
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def stop_process(bench: Bench) -> Figures:
    """Send SIGTERM to a `lora train` of its own; return how it ended, and whether it goes on."""
    recipe = _make_recipe(bench, "stopped", {}, 2000)
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe)]
    paths = os.pathsep.join(filter(None, [str(models.ROOT), os.environ.get("PYTHONPATH")]))
    metrics = recipe.parent / "run/metrics.jsonl"
    with (bench.scratch / "stopped.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths}
        )
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size > 500):
            time.sleep(0.05)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(WAIT)
    ended_in = time.monotonic() - asked
    if status != 128 + signal.SIGTERM:
        said = (bench.scratch / "stopped.log").read_text(errors="replace")[-500:]
        raise RuntimeError(f"it ended with {status}: {said}")
    done = len(runs.read_metrics(recipe))
    allowed = ("--allow-changes", "training.max_steps", "--set", f"training.max_steps={done + 3}")
    lines = runs.train(recipe, runs.Observer(bench.clock), "--resume", *allowed)
    return {"status": status, "ended_in_s": ended_in, "stopped_at": done, "resumed_to": len(lines)}
