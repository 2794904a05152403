"""Judge a run's curves: whether loss fell, which evaluation was best, what was kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.report.history import Evaluation, History
from lora_cli.report.metrics import Series
from lora_cli.report.seen import SeenRun, number

LOSSES = ("loss", "perplexity")
"""What a metric's name ends in of which less is better."""
EDGE = 10
"""The part of a curve at either end whose mean stands for it."""


class Fall(NamedTuple):
    """The mean loss of the first and of the last `points` logged steps."""

    first: float
    last: float
    points: int


class Best(NamedTuple):
    """The evaluation at which the run's own metric was best, and the last one; `last` is None
    where that was not finite, and `gaps` of the evaluations were not."""

    metric: str
    step: int
    value: float
    last_step: int
    last: float | None
    gaps: int = 0

    @property
    def is_last(self) -> bool:
        """Whether no earlier evaluation was better than the last."""
        return self.value == self.last


def measure_fall(losses: Series) -> Fall | None:
    """Return how a curve began and ended; None where it has fewer than two numbers."""
    values = [value for _, value in losses.finite()]
    if len(values) < 2:
        return None
    points = max(1, len(values) // EDGE)
    return Fall(sum(values[:points]) / points, sum(values[-points:]) / points, points)


def is_better_less(metric: str) -> bool:
    """Return whether less is better of a metric."""
    return metric.endswith(LOSSES)


def name_metric(record: SeenRun) -> tuple[str, bool]:
    """Return by which metric the run judges its steps, without `eval_`, and whether less of it is
    better."""
    given = (record.kept or {}).get("metric") or record.get("training", "metric_for_best_model")
    metric = given.removeprefix("eval_") if isinstance(given, str) and given else "loss"
    greater = record.get("training", "greater_is_better")
    less = is_better_less(metric) if not isinstance(greater, bool) else not greater
    return metric, less


def find_best(record: SeenRun, evaluations: Sequence[Mapping[str, Any]]) -> Best | None:
    """Return the best evaluation by the run's metric, or by the loss where that was not measured;
    None without evaluations."""
    metric, less = name_metric(record)
    for name, is_less in ((metric, less), ("loss", True)):
        found = [(each["step"], each[name]) for each in evaluations if name in each]
        finite = [each for each in found if each[1] is not None]
        if finite:
            step, value = (min if is_less else max)(finite, key=lambda each: each[1])
            return Best(name, step, value, *found[-1], len(found) - len(finite))
    return None


def find_kept_step(record: SeenRun) -> int | None:
    """Return the step whose weights became the adapter, where the record says which."""
    step = number((record.kept or {}).get("step"))
    return None if step is None else int(step)


def keeps_best(record: SeenRun) -> bool:
    """Return whether the run's adapter is that of its best evaluation."""
    if record.kept:
        return record.kept.get("which") == "best"
    # runs from before `keep` have the other key
    given = (record.get("training", name) for name in ("keep", "load_best_model_at_end"))
    return next(given) == "best" or next(given) is True


def find_scores(run: History) -> Evaluation | None:
    """Return the newest evaluation that has the adapter among its models."""
    found = [each for _, each in run.evaluations if each.find_kind("adapter")]
    return found[-1] if found else None


def find_pair(run: History) -> list[dict[str, Any] | None]:
    """Return base and adapter as the newest evaluation with the adapter has them, None for one that
    it has not."""
    found = find_scores(run)
    return [found.find_kind(kind) if found else None for kind in ("base", "adapter")]


def list_metrics(model: Mapping[str, Any] | None) -> list[str]:
    """Return the names of what was measured of an evaluated model."""
    metrics = (model or {}).get("metrics")
    return list(metrics) if isinstance(metrics, dict) else []


def find_difference(run: History, metric: str) -> dict[str, float] | None:
    """Return by how much a metric of the adapter is larger than the base's on the same rows, with
    its interval; None where the newest evaluation did not compare the two."""
    found, (base, adapter) = find_scores(run), find_pair(run)
    if found is None or base is None or found.to_data().get("against") != base.get("label"):
        return None
    return find_value({"metrics": (adapter or {}).get("differences")}, metric)


def find_value(model: Mapping[str, Any] | None, metric: str) -> dict[str, float] | None:
    """Return a metric of an evaluated model: `value`, and where they are known its interval `low`
    to `high`, and how many rows (`count`) and `tokens` it is of."""
    metrics = (model or {}).get("metrics")
    given = metrics.get(metric) if isinstance(metrics, dict) else None
    if not isinstance(given, dict) or number(given.get("value")) is None:
        return None
    names = ("value", "low", "high", "count", "tokens")
    return {name: found for name in names if (found := number(given.get(name))) is not None}


def find_exact(run_evaluations: Sequence[Evaluation]) -> float | None:
    """Return the share of rows that the adapter answered exactly, by the newest evaluation that
    counted them."""
    for each in reversed(run_evaluations):
        found = find_value(each.find_kind("adapter"), "exact")
        if found:
            return found["value"]
    return None
