"""How far a metric of some rows may lie from that of all rows like them: percentile bootstrap
intervals, of one model and of the difference between two (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapters 13 and 16).

Rows are drawn with replacement, as many as there are, TIMES over, from one seed: the same rows give
the same interval. What metrics count of a row are numbers that add up, so a draw is how often each
row is in it, and the sums of all draws are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Combine = Callable[[Numbers], float]
"""Makes the sums of what was counted (k) the metric's value."""
TIMES = 1000
"""Draws: their own share of chance is some 2 % of an interval's width."""
SEED = 0
SHARE = 0.95
CELLS = 2**22
"""Numbers of a product that are in memory at a time: 32 MB."""


class Interval(NamedTuple):
    """A metric's value with the ends of its 95 % interval; None of what is not defined."""

    value: float | None
    low: float | None
    high: float | None
    rows: int
    """How many it is of."""

    def to_data(self) -> dict[str, Any]:
        """Return it as evaluation.json has it."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.rows}


def divide(sums: Numbers) -> float:
    """Return a sum over what it is counted by, (2), such as losses over tokens."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


def find_interval(counted: Numbers, combine: Combine = divide) -> Interval:
    """Return the value and interval of a metric that counts (rows, k) numbers. Of a single row
    there is no interval, of none no value, and neither of what is not finite."""
    return _measure(counted, lambda sums: combine(sums))


def compare(one: Numbers, other: Numbers, combine: Combine = divide) -> Interval:
    """Return by how much the metric of `other` is larger than that of `one`, whose rows (rows, k)
    are the same: each draw takes the same rows of both, so what makes a row hard for both does not
    widen the interval."""
    assert one.shape == other.shape, "the same rows"
    width = one.shape[1]
    return _measure(
        np.hstack([one, other]), lambda sums: combine(sums[width:]) - combine(sums[:width])
    )


def _measure(counted: Numbers, combine: Combine) -> Interval:
    number = len(counted)
    value = combine(counted.sum(axis=0)) if number else float("nan")
    if not np.isfinite(value):
        return Interval(None, None, None, number)
    if number == 1:
        return Interval(float(value), None, None, 1)
    drawn = np.array([combine(sums) for sums in _draw_sums(counted)])
    tail = (1 - SHARE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail]).tolist()
    return Interval(float(value), low, high, number)


def _draw_sums(counted: Numbers) -> Iterator[Numbers]:
    """Yield the sums (k) of each draw of rows."""
    number = len(counted)
    generator = np.random.default_rng(SEED)
    at_once = max(1, CELLS // number)
    for start in range(0, TIMES, at_once):
        rows = min(at_once, TIMES - start)
        drawn = generator.integers(0, number, (rows, number))
        drawn += np.arange(rows)[:, None] * number  # each draw counts in a part of its own
        often = np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number)
        yield from often.astype(np.float64) @ counted


def make_shares(scores: list[float] | NDArray[Any]) -> Numbers:
    """Return what a mean counts of rows with these scores: (rows, 2)."""
    values = np.asarray(scores, np.float64)
    return np.column_stack([values, np.ones(len(values))])
