"""Bootstrap intervals against a plain loop over the same draws, and how often they hold what they
are to hold.

Hermetic: numpy. Alone: pytest tests/scoring/test_bootstrap.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_cli.scoring import bootstrap


def draw_plainly(counted: list[list[float]], value) -> tuple[float, float]:
    """The interval by Python's own loops, over the draws of one generator."""
    generator, number = np.random.default_rng(bootstrap.SEED), len(counted)
    drawn = []
    for _ in range(bootstrap.TIMES):
        rows = [counted[at] for at in generator.integers(0, number, number).tolist()]
        drawn.append(value([math.fsum(column) for column in zip(*rows)]))
    drawn.sort()
    ends = []
    for share in (0.025, 0.975):
        place = share * (len(drawn) - 1)
        below = math.floor(place)
        ends.append(drawn[below] + (place - below) * (drawn[below + 1] - drawn[below]))
    return ends[0], ends[1]


@pytest.mark.parametrize("cells", [2**22, 50])
def test_an_interval_is_that_of_a_plain_loop(monkeypatch, cells: int) -> None:
    """However many draws are in memory at a time."""
    monkeypatch.setattr(bootstrap, "CELLS", cells)
    counted = [[2.5, 3.0], [10.0, 4.0], [0.1, 1.0], [40.0, 9.0], [7.0, 7.0]]
    found = bootstrap.find_interval(np.array(counted))
    low, high = draw_plainly(counted, lambda sums: sums[0] / sums[1])
    assert found.value == pytest.approx(59.6 / 24, rel=1e-12)  # by tokens, not a mean of rows
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.rows == 5


def test_a_difference_is_of_the_same_rows() -> None:
    """Rows that are hard for both do not widen it: two models that differ by a constant."""
    generator = np.random.default_rng(1)
    one = np.column_stack([generator.uniform(0, 100, 40), np.ones(40)])
    other = one + [1.0, 0.0]
    found = bootstrap.compare(one, other)
    assert found[:3] == pytest.approx((1, 1, 1), abs=1e-9)
    pairs = np.hstack([one, other[::-1]]).tolist()
    low, high = draw_plainly(pairs, lambda s: s[2] / s[3] - s[0] / s[1])
    found = bootstrap.compare(one, other[::-1])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_what_has_no_interval() -> None:
    assert bootstrap.find_interval(np.zeros((0, 2))) == (None, None, None, 0)
    assert bootstrap.find_interval(bootstrap.make_shares([1.0])) == (1.0, None, None, 1)
    broken = bootstrap.make_shares([1.0, float("nan")])
    assert bootstrap.find_interval(broken) == (None, None, None, 2)
    assert bootstrap.find_interval(bootstrap.make_shares([1.0] * 9)) == (1, 1, 1, 9)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = bootstrap.find_interval(bootstrap.make_shares(generator.random(60) < 0.4))
        held += found.low <= 0.4 <= found.high
    assert 178 <= held <= 198
