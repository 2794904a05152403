"""Curves thinned, smoothed and laid out: nothing of what matters is lost.

Hermetic. Alone: pytest tests/report/test_curves.py
"""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.report import charts, curves
from lora_cli.report.metrics import Series

VALUES = st.none() | st.floats(-1e6, 1e6)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_extremes_gaps_and_order(values: list[float | None], buckets: int) -> None:
    series = Series(list(range(3, 3 + len(values))), values)
    pieces = curves.thin(series, buckets)
    points = [point for piece in pieces for point in piece]
    finite = series.finite()
    assert set(points) <= set(finite)
    assert points == sorted(points)
    assert len(points) <= max(2 * buckets, 1) or len(points) == len(finite) <= 2 * buckets
    if finite:
        ends = {min(value for _, value in finite), max(value for _, value in finite)}
        assert ends <= {value for _, value in points}
    missing = [step for step, value in zip(series.steps, values) if value is None]
    for piece in pieces:
        assert not [step for step in missing if piece[0][0] < step < piece[-1][0]]


def test_smoothing_is_the_mean_of_weights_that_fall() -> None:
    values = [math.sin(at) for at in range(100)]
    smoothed, span = curves.smooth(Series(list(range(100)), values))
    assert span == 4
    keep = 1 - 2 / (span + 1)
    for at in (0, 1, 50, 99):
        weights = [keep ** (at - earlier) for earlier in range(at + 1)]
        mean = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
        assert smoothed.values[at] == pytest.approx(mean, abs=1e-12)


def test_smoothing_leaves_gaps_as_they_are() -> None:
    values = [1.0, None, *[2.0] * 10]
    smoothed, _ = curves.smooth(Series(list(range(12)), values))
    assert [value is None for value in smoothed.values] == [value is None for value in values]
    assert curves.smooth(Series([1, 2], [1.0, 2.0])) == (Series(), 0)


HARD = {
    "one point": [5.0],
    "all the same": [2.5] * 10,
    "all zero": [0.0] * 10,
    "huge": [-9e299, 9e299, 0.0],
    "tiny": [1e-290, 2e-290, 5e-290],
    "tinier": [5e-324, 1e-322, 4e-323],
    "a spike": [1.0] * 20 + [1e12] + [1.0] * 20,
    "with gaps": [None, 1.0, None, 2.0, None],
    "negative": [-3.0, -2.0, -1.0],
    "large and near": [1e15, 1e15 + 1, 1e15 + 2],
}


@pytest.mark.parametrize("values", HARD.values(), ids=HARD)
def test_a_chart_of_any_numbers_stays_in_its_box(values: list[float | None]) -> None:
    series = Series(list(range(len(values))), values)
    chart = charts.lay_out("t", "u", "s", [charts.Line("l", series, "s1")])
    assert chart is not None
    left, top, right, bottom = chart.box
    numbers = re.findall(r"([\d.e-]+) ([\d.e-]+)", chart.lines[0]["path"])
    assert numbers
    for x, y in numbers:
        assert left <= float(x) <= right
        assert top <= float(y) <= bottom
    assert 1 <= len(chart.y_ticks) <= 9
    assert len(chart.x_ticks) <= 9
    assert chart.lines[0]["path"].count("M") == len(curves.thin(series))


def test_a_spike_is_drawn_on_a_logarithmic_axis() -> None:
    series = Series(list(range(41)), HARD["a spike"])
    chart = charts.lay_out("t", "u", "s", [charts.Line("l", series, "s1")])
    assert chart is not None
    assert chart.logarithmic
    assert [text for _, text in chart.y_ticks] == ["1", "1000", "1M", "1G", "1e+12"]


def test_nothing_finite_is_no_chart() -> None:
    assert charts.lay_out("t", "", "", [charts.Line("l", Series([1], [None]), "s1")]) is None


def test_the_best_step_is_marked_where_it_is() -> None:
    series = Series([10, 20, 30], [1.0, 0.5, 0.8])
    line = charts.Line("l", series, "s1", (20, "best: step 20"), dots=True)
    chart = charts.lay_out("t", "u", "s", [line])
    assert chart is not None
    [mark] = chart.marks
    assert (mark["x"], mark["y"]) == chart.lines[0]["dots"][1]
    assert mark["said"] == "best: step 20"
