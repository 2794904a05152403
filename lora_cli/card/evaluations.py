"""What `lora evaluate` found, before and after: evaluation.json as a table of the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.card.markdown import code, plain, table
from lora_cli.card.portable import is_public_name, name_file
from lora_cli.common import files, provenance, spell_count, stored

FILE = "evaluation.json"


class Metric(stored.Stored):
    """A metric with the interval that it lies in."""

    value: float | int | None
    low: float | int | None = None
    high: float | int | None = None
    count: int | None = None


class Judged(stored.Stored):
    """A model, and what was measured of it."""

    label: str
    kind: str = ""
    metrics: dict[str, Metric] = {}
    forgetting: dict[str, Any] | None = None


class EvaluatedData(stored.Stored):
    """The rows that were asked: the name of their file, and the sha256 of its content."""

    name: str
    sha256: str | None = None
    rows: int | None = None


class Evaluation(stored.Stored):
    """What stands in evaluation.json."""

    data: EvaluatedData
    models: list[Judged]


class Known(stored.Stored):
    """What a run's record says of which adapter is in its folder."""

    id: str | None = None
    resumed: list[str] = []


def find_evaluations(artefact: Path, training: Mapping[str, Any]) -> list[Path]:
    """Return the evaluations in the folder of the run that an artefact came from, where that is
    the folder around it; `training` is that run's record when the artefact was made.

    Those of another adapter, from before the run went on or since, are left out.
    """
    run = artefact.resolve().parent
    record = run / provenance.RUN_RECORD
    known = Known.read(record) if record.is_file() else Known()
    if known.id is None or known.id != training.get("id"):
        return []
    resumed = training.get("resumed") or []
    since = known.resumed[len(resumed) :]
    first, end = (resumed[-1] if resumed else ""), (since[0] if since else None)
    found = sorted(run.glob(f"evaluations/*/{FILE}"))
    return [each for each in found if _is_within(each, first, end)]


def _is_within(evaluation: Path, first: str, end: str | None) -> bool:
    """Return whether an evaluation was begun from `first` on and before `end`, in ISO 8601, UTC."""
    started = files.read_mapping(evaluation).get("started")
    if not isinstance(started, str):
        return True
    return first <= started and (end is None or started < end)


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return what an evaluation found. LoraError where the file is none."""
    return Evaluation.read(path / FILE if path.is_dir() else path).to_data()


def list_evaluated(evaluations: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each evaluation: a column for each model; no row of the data."""
    if evaluations:
        yield "## Evaluation"
    for each in evaluations:
        data, models = each["data"], each["models"]
        rows = f", {spell_count(format(data['rows'], ','), 'row')}" if data.get("rows") else ""
        digest = f", sha256 {code(data['sha256'])}" if data.get("sha256") else ""
        yield f"On {code(name_file(data['name']))}{rows}{digest}:"
        names = dict.fromkeys(name for model in models for name in model.get("metrics", {}))
        lines = [[plain(name), *(_show(_find(model, name)) for model in models)] for name in names]
        lost = [_round((model.get("forgetting") or {}).get("loss")) for model in models]
        if any(lost):
            lines.append(["loss on general text", *lost])
        yield table(["", *map(_name_model, models)], lines)


def _find(model: dict[str, Any], metric: str) -> dict[str, Any] | None:
    found = model.get("metrics", {}).get(metric)
    return found if isinstance(found, dict) else None


def _name_model(model: dict[str, Any]) -> str:
    """Return what a model is, and what it was called, without its folder."""
    label, kind = model["label"], model.get("kind") or ""
    label = label if kind == "base" and is_public_name(label) else name_file(label)
    return plain(kind) if label == kind else f"{plain(kind)} {code(label)}".strip()


def _show(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return ""
    value, low, high = (metric.get(key) for key in ("value", "low", "high"))
    interval = f" ({_round(low)} to {_round(high)})" if None not in (low, high) else ""
    return f"{_round(value)}{interval}"


def _round(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
