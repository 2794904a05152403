"""Draw the page: the facts in words and tables, the curves as drawings, all in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from lora_cli.common import format_duration
from lora_cli.report import charts, curves, facts, outcome
from lora_cli.report.history import History
from lora_cli.report.metrics import Series

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = 6
"""How many runs have a colour and a pattern of their own in a chart."""


def render(runs: Sequence[History], said: Mapping[str, Any]) -> str:
    """Return the page of runs, of which `said` are the facts that `facts.gather` returns."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"exact": json.dumps, "shown": show_number}
    page = environment.get_template("page.html")
    drawn = [draw_run(run, of_run) for run, of_run in zip(runs, said["runs"], strict=True)]
    compared = draw_together(runs, [each["name"] for each in said["runs"]]) if len(runs) > 1 else []
    try:
        return page.render(**said, drawn=drawn, compared=compared, colours=COLOURS)
    except TemplateError as error:  # a model's chat template is what one of jinja's is known as
        raise RuntimeError(f"the report's template: {error}") from error


def show_number(value: float, how: str = "") -> str:
    """Return a number as it is read: `how` is `loss`, `percent`, `tiny`, `time` or nothing."""
    if how == "percent":
        return f"{value:.1%}"
    if how == "time":
        return format_duration(value)
    if how == "tiny":
        return f"{value:.1e}" if value else "0"
    if how == "loss":
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 1e15)
    if whole or 1e3 <= abs(value) < 1e9:
        return f"{round(value):,}"
    return f"{value:.4g}"


def draw_run(run: History, said: Mapping[str, Any]) -> dict[str, charts.Chart]:
    """Return the charts of a run, each by its metric's name."""
    best = outcome.find_best(run.record, run.metrics.list_evaluations())
    found = {}
    for curve in said["curves"]:
        name, series = curve["name"], run.metrics.get(curve["name"])
        lines = [charts.Line(curve["title"], series, "s1")]
        if name == "loss":
            smoothed, span = curves.smooth(series)
            lines = [charts.Line("as logged", series, "raw")] if span else lines
            lines += [charts.Line(f"smoothed over {span} points", smoothed, "s1")] if span else []
        if name == "eval_loss":
            marked = (best.step, f"best: step {best.step:,}") if best else None
            lines = [charts.Line(curve["title"], series, "s2", marked, dots=True)]
        if chart := charts.lay_out(curve["title"], curve["unit"], describe(curve), lines):
            found[name] = chart
    return found


def describe(curve: Mapping[str, Any]) -> str:
    """Return a curve in words, for those who do not see it."""
    points = f"{curve['points']:,} points"
    missing = curve.get("not_finite")
    gaps = f", {missing:,} of them not finite, which are gaps" if missing else ""
    if "first" not in curve:
        return f"{points}{gaps}."
    first, last, least, most = (
        show_number(curve[name]) for name in ("first", "last", "least", "most")
    )
    return (
        f"{points}{gaps}: {first} at first, {last} at last; least {least} at step "
        f"{curve['least_step']:,}, most {most} at step {curve['most_step']:,}."
    )


def draw_together(runs: Sequence[History], names: Sequence[str]) -> list[charts.Chart]:
    """Return the charts in which runs are compared: training loss and evaluation loss."""
    found = []
    units = {facts.find_loss_unit(run.record.recipe) for run in runs}
    for name, title in facts.LOSSES.items():
        lines, unit = [], " or ".join(sorted(units))
        for at, run in enumerate(runs[:COLOURS]):
            series = run.metrics.get(name)
            smoothed = curves.smooth(series)[0] if name == "loss" else Series()
            drawn = smoothed if smoothed.steps else series
            lines.append(charts.Line(names[at], drawn, f"s{at + 1}", dots=name != "loss"))
        ends = [(line.label, line.series.finite()) for line in lines]
        said = "; ".join(f"{label} ends at {show_number(end[-1][1])}" for label, end in ends if end)
        chart = charts.lay_out(title, unit, f"{said}.", lines)
        found += [chart] if chart else []
    return found
