"""Tell which step of a run became its adapter, and how it and the last one evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import provenance
from lora_cli.models import RecordedKept


class Trained(NamedTuple):
    """How training ended."""

    steps: int
    mean_loss: float
    effort: dict[str, float]
    """Speed and memory."""
    metric: str
    """What tells the best step."""
    best_step: int | None
    """None where it is not asked for, or no evaluation gave a number."""
    why: str
    """Why it ended before its steps were done."""
    seen: int = 0
    """Tokens, or pictures, that were trained on in all."""


def describe_end(trainer: Any, steps: int, mean_loss: float) -> Trained:
    """Return how a trainer's training has ended."""
    state, options = trainer.state, trainer.options
    best = state.best_global_step if options.keeps_best and state.best_model_checkpoint else None
    why = ""
    if trainer.stopping.is_over and steps < state.max_steps:
        number = trainer.stopping.early_stopping_patience_counter
        why = f"{number} evaluations in a row were no better than the best before them"
        if number == 1:
            why = "an evaluation was no better than the best before it"
    seen = int(state.num_input_tokens_seen)
    effort = trainer.watch.measure_effort(state)
    return Trained(steps, mean_loss, effort, trainer.name_best_metric(), best, why, seen)


def find_kept(folder: Path, trained: Trained) -> RecordedKept | None:
    """Return which step became the adapter, with what metrics.jsonl says of it and of the last
    one; None for a run without evaluations."""
    values = _read_evaluations(folder / provenance.METRICS, trained.metric)
    if not values:
        return None
    step = trained.best_step or trained.steps
    return RecordedKept(
        which="best" if trained.best_step else "last",
        step=step,
        metric=trained.metric,
        value=values.get(step),
        last_step=trained.steps,
        last_value=values.get(trained.steps),
        why=trained.why,
    )


def _read_evaluations(metrics: Path, name: str) -> dict[int, float | None]:
    """Return the values of a metric by the step that was evaluated."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def list_lines(kept: RecordedKept) -> list[str]:
    """Return what to say of it at the end of a run."""
    lines = [f"stopped early at step {kept.last_step}: {kept.why}"] if kept.why else []
    value = _describe(kept.metric, kept.value)
    if kept.step == kept.last_step:
        best = ", the best of all" if kept.which == "best" else ""
        return [*lines, f"kept the last step, {kept.step}: {value}{best}"]
    last = _describe(kept.metric, kept.last_value)
    return [*lines, f"kept step {kept.step}, the best: {value}; the last, {kept.last_step}: {last}"]


def _describe(metric: str, value: float | None) -> str:
    return f"{metric} {'not evaluated' if value is None else f'{value:.4f}'}"
