"""Make curves small and smooth: few enough points to draw, none of the extremes lost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lora_cli.report.metrics import Series

BUCKETS = 240
"""Parts of the horizontal axis of which the lowest and the highest point are kept."""
SPANS = 25
"""A curve is smoothed over this part of its points."""
FEWEST = 8
"""Points of a curve that is smoothed."""
STEEP = 60.0
"""How many times its median the highest value is where an axis is logarithmic."""

Point = tuple[float, float]


def smooth(series: Series) -> tuple[Series, int]:
    """Return the exponential mean of a curve, corrected for its beginning as Adam's are, and over
    how many points it is; empty for a curve too short to be smoothed.

    With span n the weight of a point falls by 1 - 2 / (n + 1) at each later one.
    """
    finite = series.finite()
    if len(finite) < FEWEST:
        return Series(), 0
    span = max(3, len(finite) // SPANS)
    keep = 1 - 2 / (span + 1)
    made, mean, weight = Series(), 0.0, 0.0
    for step, value in zip(series.steps, series.values):
        if value is None:
            made.add(step, None)
            continue
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        made.add(step, mean / weight)
    return made, span


def thin(series: Series, buckets: int = BUCKETS) -> list[list[Point]]:
    """Return a curve's points in pieces, with a gap where values were not finite: all of them, or
    of each of `buckets` equal parts of its steps the first lowest and the first highest, in
    order."""
    if len(series.steps) <= 2 * buckets:
        return _split(series.steps, series.values)
    first, last = min(series.steps), max(series.steps)
    width = (last - first) / buckets or 1
    steps: list[int] = []
    values: list[float | None] = []
    start = 0
    places = [min(buckets - 1, int((step - first) / width)) for step in series.steps]
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[start]:
            kept, broken = _keep_extremes(series.values[start:end])
            for at in kept:
                steps += [series.steps[start + at]] * (1 + broken)
                values += [None] * broken + [series.values[start + at]]
            if broken:
                steps.append(series.steps[end - 1])
                values.append(None)
            start = end
    return _split(steps, values)


def _keep_extremes(values: Sequence[float | None]) -> tuple[list[int], bool]:
    """Return where the lowest and the highest value are, in order, and whether one was not
    finite."""
    finite = [(value, at) for at, value in enumerate(values) if value is not None]
    if not finite:
        return [], True
    lowest, highest = min(finite)[1], max(finite, key=lambda each: each[0])[1]
    return sorted({lowest, highest}), len(finite) < len(values)


def _split(steps: Sequence[int], values: Sequence[float | None]) -> list[list[Point]]:
    pieces: list[list[Point]] = [[]]
    for step, value in zip(steps, values):
        if value is not None:
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def is_steep(values: Sequence[float]) -> bool:
    """Return whether values are so far apart that only a logarithmic axis shows them all."""
    return len(values) > 4 and min(values) > 0 and max(values) > STEEP * median(values)
