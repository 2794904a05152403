"""What a terminal shows of a run while it goes on, as lines for `ui.Screen`: numbers, and curves
as sparklines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.common import ui
from lora_cli.plan import memory
from lora_cli.recipe import Recipe

Line = list[tuple[str, str]]
BARS = "▁▂▃▄▅▆▇█"
MOST = 512
"""Points of a curve that are kept, at most twice as many."""
WIDE = 76
"""Columns from which on words are written in full."""
LABEL = 15
"""Columns of a label there."""
GENERAL = ("model", "merged", "base", "data", "train.jsonl", "train.json", "train.parquet")
"""Names that say little without the folder they are in."""
ANSWER = 3
"""Lines that an answer may take where there is room."""


class Curve:
    """Numbers in order. Of a long run neighbours are joined to their mean, so that the whole of it
    is kept in a bounded number of points."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.joined = 1
        """How many numbers a point is the mean of."""
        self._open: list[float] = []

    def add(self, number: float) -> None:
        """Add a number; one that is not finite is left out."""
        if not math.isfinite(number):
            return
        self._open.append(number)
        if len(self._open) < self.joined:
            return
        self.points.append(sum(self._open) / self.joined)
        self._open.clear()
        if len(self.points) >= 2 * MOST:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [(first + second) / 2 for first, second in pairs]
            self.joined *= 2

    def draw(self, width: int) -> str:
        """Return it as a sparkline of `width` characters at most, each the mean of its part."""
        points = [*self.points, *([sum(self._open) / len(self._open)] if self._open else [])]
        shown = min(width, len(points))
        edges = [place * len(points) // shown for place in range(shown + 1)] if shown else []
        means = [sum(points[start:end]) / (end - start) for start, end in zip(edges, edges[1:])]
        if not means:
            return ""
        low, span = min(means), max(means) - min(means)
        return "".join(BARS[round((each - low) / span * 7) if span else 0] for each in means)


@dataclass
class Picture:
    """What is known of a run at one moment."""

    subject: Sequence[str] = ()
    """What is trained on what: method and base, and the data."""
    unit: str = "tokens"
    planned: int | None = None
    """Bytes that the plan says are taken at most."""
    metric: str = "eval_loss"
    """What tells the best evaluation."""
    greater: bool = False
    """Whether more of it is better."""
    step: int = 0
    steps: int = 0
    left: float | None = None
    """Seconds."""
    doing: str = ""
    """What goes on between two steps."""
    loss: float = math.nan
    losses: Curve = field(default_factory=Curve)
    evaluated: tuple[int, float] | None = None
    """Step of the last evaluation, and what the metric was."""
    best: tuple[int, float] | None = None
    evaluations: Curve = field(default_factory=Curve)
    rate: float = 0.0
    norm: float = math.nan
    speed: float = 0.0
    used: float | None = None
    """Share of the device's peak, where that is known."""
    memory: int = 0
    peak: int = 0
    sample: tuple[str, str, str] | None = None
    """A prompt, the base's answer and the newest one."""

    def add_evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Note an evaluation, by what was found of each metric; None is no finite number."""
        given = found.get(self.metric)
        value = math.nan if given is None else float(given)
        self.evaluated = (step, value)
        self.evaluations.add(value)
        sign = -1 if self.greater else 1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best[1]):
            self.best = (step, value)

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up the curves of a run that goes on from what its metrics.jsonl says."""
        last = 0
        for found in lines:
            step = found["step"]
            if (loss := found.get("loss")) is not None:
                for _ in range(step - last):  # a line for several steps has their mean
                    self.losses.add(loss)
                last = step
            if "eval_loss" in found:
                self.add_evaluation(step, found)

    def draw(self, columns: int, rows: int) -> list[Line]:
        """Return the lines for a window. Where they are too many, those at the end are left out."""
        wide = columns >= WIDE
        head = [*self._draw_subject(wide), self._draw_step(columns - 1)]
        lines = [*head, *self._draw_curves(columns - 1, wide), *self._draw_numbers(wide)]
        room = rows - 2 - len(lines)  # the first is empty, and one is left for prose
        return [*lines, *self._draw_sample(columns - 1, wide, room)][: rows - 2]

    def _draw_subject(self, wide: bool) -> Iterator[Line]:
        if wide:
            yield [(" · ".join(self.subject), "bold")]
        else:
            yield from ([(each, "bold")] for each in self.subject)

    def _draw_step(self, width: int) -> Line:
        share = self.step / self.steps if self.steps else 0.0
        said = f"step {self.step}/{self.steps} "
        left = "" if self.left is None else f" {ui.format_duration(self.left)} left"
        after = f" {self.doing}" if self.doing else f" {share:4.0%} {left}"
        if len(said) + len(after) > width:  # a number like that needs no bar
            after = after if self.doing else left
        room = max(0, width - len(said) - len(after))
        done = round(room * share)
        return [
            (said, ""),
            ("━" * done, "green"),
            ("─" * (room - done), "dim"),
            (after, ""),
        ]

    def _draw_curves(self, width: int, wide: bool) -> Iterator[Line]:
        yield self._draw_curve("loss", self.loss, self.losses, "", width, wide)
        if self.evaluated is not None:
            best = ""
            if self.best is not None:
                best = f"  best {self.best[1]:.4f} at{' step' * wide} {self.best[0]}"
            other = self.metric.removeprefix("eval_").replace("loss", "")
            name = (other or "evaluation")[: LABEL - 1] if wide else "eval"
            yield self._draw_curve(name, self.evaluated[1], self.evaluations, best, width, wide)

    def _draw_curve(
        self, name: str, now: float, curve: Curve, after: str, width: int, wide: bool
    ) -> Line:
        said = f"{now:.4f}" if math.isfinite(now) else "-"
        before = f"{name:{LABEL if wide else 5}}{said} "
        return [
            _label(before[: LABEL if wide else 5]),
            (before[LABEL if wide else 5 :], ""),
            (curve.draw(width - len(before) - len(after)), "cyan"),
            (after, ""),
        ]

    def _draw_numbers(self, wide: bool) -> Iterator[Line]:
        norm = "-" if math.isnan(self.norm) else f"{self.norm:.3g}"
        used = "" if self.used is None else f"  MFU {self.used:.0%}"
        speed = f"{self.speed:,.0f} {self.unit}/s{used}"
        if wide:
            rate = f"{self.rate:.2e}   "
            yield [_label(f"{'learning rate':{LABEL}}"), (rate, ""), _label("gradient norm "),
                   (f"{norm}   {speed}", "")]  # fmt: skip
        else:
            yield [_label("lr "), (f"{self.rate:.2e}  ", ""), _label("norm "), (norm, "")]
            yield [(speed, "")]
        yield self._draw_memory(wide)

    def _draw_memory(self, wide: bool) -> Line:
        now, peak = memory.format_bytes(self.memory), max(self.memory, self.peak)
        said = f"{now}{' now' * wide}, peak {memory.format_bytes(peak)}"
        if self.planned is not None:
            said += f" of {memory.format_bytes(self.planned)}{' planned' * wide}"
        return [_label(f"{'memory':{LABEL}}" if wide else "mem "), (said, "")]

    def _draw_sample(self, width: int, wide: bool, room: int) -> Iterator[Line]:
        """Draw the sample prompt and its answers, each in as many lines as there is room for."""
        if self.sample is None or room < 3:
            return
        label = LABEL if wide else 7
        most = min(ANSWER, (room - 1) // 2)
        for name, text, lines in zip(("prompt", "base", "now"), self.sample, (1, most, most)):
            plain = " ".join(text.split()) or "(nothing)"
            for number, piece in enumerate(ui.wrap(plain, width - label, lines)):
                yield [_label(f"{'' if number else name:{label}}"), (piece, "")]


def name_subject(recipe: Recipe) -> tuple[str, str]:
    """Return what is trained on what: method and base, and the data, by their last names."""
    data = recipe.data
    given = [part.path for part in data.mix] if data.mix else [data.path]
    paths = [path for each in given for path in ([each] if isinstance(each, str) else each or [])]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"{recipe.method} on {_name_last(recipe.model.name_or_path)}",
        f"{_name_last(paths[0])}{more}",
    )


def _name_last(place: str) -> str:
    """Return the name of a folder or file, or the last two parts of a path of few words."""
    parts = place.rstrip("/").split("/")
    return "/".join(parts[-2:]) if parts[-1] in GENERAL else parts[-1]


def _label(text: str) -> tuple[str, str]:
    return text, "dim"
