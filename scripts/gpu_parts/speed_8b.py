"""A model of 8B: tokens a second, share of the device's arithmetic, and memory against the plan."""

from __future__ import annotations

from functools import partial

from gpu_parts import models, speed_1b, speeds
from gpu_parts.part import Bench, Case, Figures, NotHereError

TITLE = "8B: steps of 8,192 tokens in rows of 512, rank 16 on all linear layers"
COLUMNS = speeds.COLUMNS
LENGTH, ROWS = 512, 16
MAKING = 110
"""Seconds in which 16 GB should be on the disk."""
RUNS: dict[str, Figures] = {
    "as it is": {},
    "QLoRA": {"method": "qlora"},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "DoRA": {"method": "dora"},
}


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    cases = {
        "made": Case(partial(models.measure_making, name="8B"), MAKING),
        "as it is": Case(partial(measure, "as it is"), 60),
        "quickest of 1B": Case(measure_best, 75),
    }
    return cases | {name: Case(partial(measure, name), 60) for name in RUNS if name not in cases}


def measure(name: str, bench: Bench) -> Figures:
    """Train as the recipe of this name says."""
    return _measure(bench, name, RUNS[name], [])


def measure_best(bench: Bench) -> Figures:
    """Train with what was quickest on 1B."""
    settings = speed_1b.find_best(bench)
    if settings is None:
        raise NotHereError("nothing was measured on 1B")
    named = ", ".join([*settings["levers"], str(settings["changes"])])
    found = _measure(bench, "quickest", settings["changes"], settings["levers"])
    return found | {"settings": named}


def _measure(bench: Bench, name: str, changes: Figures, names: list[str]) -> Figures:
    model = models.find_made(bench, "8B")
    length, number = (64, 4) if bench.small else (LENGTH, ROWS)
    rows = models.write_even_rows(bench, length, number * speeds.STEPS)
    training = changes.get("training", {}) | {"per_device_train_batch_size": number}
    given = changes | {"training": training}
    return speeds.measure(bench, f"8B {name}", model, rows, given, names, plans=True)
