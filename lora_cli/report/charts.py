"""Lay out a chart: where its lines, marks and ticks are, for chart.svg to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_cli.report import curves
from lora_cli.report.metrics import Series

WIDTH, HEIGHT = 460, 250
LEAST = 1e-300
"""The least step between two ticks: smaller numbers lose their digits, and become 0."""
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 40
"""Units of the drawing, which is scaled to the page: margins hold the labels of the axes."""


class Line(NamedTuple):
    """A curve of a chart. `look`: its class in the style sheet; `mark`: the step to be marked, and
    what it is called."""

    label: str
    series: Series
    look: str
    mark: tuple[int, str] | None = None
    dots: bool = False


@dataclass
class Chart:
    """A chart laid out, in the units of the drawing."""

    title: str
    unit: str
    said: str
    """What it shows, for those who do not see it."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    logarithmic: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def lay_out(title: str, unit: str, said: str, lines: Sequence[Line]) -> Chart | None:
    """Return a chart of lines over their steps; None where none has a value."""
    values = [value for line in lines for _, value in line.series.finite()]
    if not values:
        return None
    chart = Chart(title, unit, said, logarithmic=curves.is_steep(values))
    steps = [step for line in lines for step in line.series.steps]
    across = Axis.over(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    low, high = min(values), max(values)
    upward = (
        Axis.over_powers(low, high, HEIGHT - BOTTOM, TOP)
        if chart.logarithmic
        else Axis.over(*_widen(low, high), HEIGHT - BOTTOM, TOP)
    )
    chart.x_ticks = [(across.place(tick), label(tick)) for tick in across.list_ticks(5, whole=True)]
    chart.y_ticks = [(upward.place(tick), label(tick)) for tick in upward.list_ticks(5)]
    for line in lines:
        pieces = curves.thin(line.series)
        placed = [[(across.place(x), upward.place(y)) for x, y in piece] for piece in pieces]
        few = line.dots and sum(map(len, placed)) <= 60
        chart.lines.append(
            {
                "label": line.label,
                "look": line.look,
                "path": "".join(map(_draw, placed)),
                "dots": [point for piece in placed for point in piece] if few else [],
            }
        )
        if mark := _place_mark(line, across, upward):
            chart.marks.append(mark)
    return chart


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return a range with room above and below, from 0 where it begins near that."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.25 * high else low - room
    return bottom, high + room


def _place_mark(line: Line, across: Axis, upward: Axis) -> dict[str, Any] | None:
    if line.mark is None:
        return None
    step, said = line.mark
    value = next((value for at, value in line.series.finite() if at == step), None)
    if value is None:
        return None
    x, y = across.place(step), upward.place(value)
    anchor = "start" if x < LEFT + 60 else "end" if x > WIDTH - RIGHT - 60 else "middle"
    below = y < TOP + 24
    return {
        "x": x,
        "y": y,
        "text_y": round(y + 20 if below else y - 10, 1),
        "said": said,
        "look": line.look,
        "anchor": anchor,
    }


def _draw(piece: Sequence[tuple[float, float]]) -> str:
    """Return the path through points; a lone one is a dot."""
    text = "M" + "L".join(f"{x:g} {y:g}" for x, y in piece)
    return f"{text}h.1" if len(piece) == 1 else text


class Axis(NamedTuple):
    """An axis from `low` at `start` to `high` at `end`, of units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float) -> Axis:
        """Return an axis over a range, which may be a single value."""
        return cls(low, high if high > low else low + 1, start, end)

    @classmethod
    def over_powers(cls, low: float, high: float, start: float, end: float) -> Axis:
        """Return a logarithmic axis over values above 0."""
        bottom, top = math.log10(low), math.log10(high)
        room = (top - bottom) * 0.05 or 0.5
        return cls(bottom - room, top + room, start, end, True)

    def place(self, value: float) -> float:
        """Return where a value is drawn, to a tenth of a unit."""
        at = math.log10(value) if self.logarithmic else value
        share = (at - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def list_ticks(self, about: int, whole: bool = False) -> list[float]:
        """Return round values on the axis, some `about` of them."""
        if self.logarithmic:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            every = max(1, math.ceil(len(powers) / about))
            return [10.0**power for power in powers[::every]]
        step = _choose_step(max((self.high - self.low) / about, LEAST))
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [at * step for at in range(first, last + 1)]


def _choose_step(rough: float) -> float:
    """Return the next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)


UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def label(value: float) -> str:
    """Return the label of a tick, such as `0.25`, `20k` or `2e-05`."""
    if abs(value) < 1e-12:
        return "0"
    if 1e4 <= abs(value) < 1e12:
        size, unit = next(each for each in UNITS if abs(value) >= each[0])
        return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
