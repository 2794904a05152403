"""Read metrics.jsonl, whatever ended it: what can be read of it is, and the rest is counted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, plain_files
from lora_cli.report.seen import number

LONGEST = 2**20
"""Bytes of a line; a longer one is not ours."""
MOST_NAMES = 200
"""Metrics that a run has at most: what calls itself more is no metric of ours."""


@dataclass
class Series:
    """A metric along the steps; None where it was not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, step: int, value: float | None) -> None:
        """Add the value of a step."""
        self.steps.append(step)
        self.values.append(value)

    def finite(self) -> list[tuple[int, float]]:
        """Return the steps and values that are numbers."""
        return [(step, each) for step, each in zip(self.steps, self.values) if each is not None]

    @property
    def gaps(self) -> int:
        """How many values were not finite."""
        return sum(each is None for each in self.values)


@dataclass
class Metrics:
    """The lines of a run's metrics.jsonl: each metric that stands in them by its name."""

    series: dict[str, Series] = field(default_factory=dict)
    lines: int = 0
    unreadable: int = 0
    """Lines that are none of ours, such as one that a crash has cut off."""

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return max((each.steps[-1] for each in self.series.values() if each.steps), default=0)

    def get(self, name: str) -> Series:
        """Return a metric; one of no steps where the run has none of this name."""
        return self.series.get(name) or Series()

    def list_evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations in order: the step, and each metric without its `eval_`."""
        found: dict[int, dict[str, Any]] = {}
        for name, series in self.series.items():
            if name.startswith("eval_") and not name.endswith(UNSHOWN):
                for step, value in zip(series.steps, series.values):
                    found.setdefault(step, {"step": step})[name.removeprefix("eval_")] = value
        return [found[step] for step in sorted(found)]


UNSHOWN = ("_runtime", "_per_second")
"""What Trainer adds to an evaluation that says nothing of the model."""


def read_metrics(path: Path) -> Metrics:
    """Return what a metrics.jsonl holds; nothing where there is none.

    LoraError for a pipe or a device, and where it may not be read.
    """
    return _parse_metrics(read_lines(path))


def _parse_metrics(lines: Iterable[bytes]) -> Metrics:
    found = Metrics()
    for line in lines:
        values = parse_object(line)
        step = values.get("step") if values else None
        if values is None or type(step) is not int or not 0 <= step < 2**53:
            found.unreadable += 1
            continue
        found.lines += 1
        for name, value in values.items():
            if name == "step" or (value is not None and not isinstance(value, (int, float))):
                continue
            if name in found.series or len(found.series) < MOST_NAMES:
                found.series.setdefault(name, Series()).add(step, number(value))
    return found


def find_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return a run's evaluations as `Metrics.list_evaluations` does, parsing no other line."""
    return _parse_metrics(line for line in read_lines(path) if b'"eval_' in line).list_evaluations()


def find_last_step(path: Path) -> int:
    """Return the last step that metrics.jsonl knows of, 0 where it knows of none."""
    last = 0
    for line in read_lines(path):
        if found := STEP.match(line):
            last = max(last, int(found[1]))
    return last


STEP = re.compile(rb'\{"step": (\d{1,15})\b')
"""How a line begins."""


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that are not empty, the beginning alone of one over LONGEST; none
    where there is no file. LoraError where it is not a file, or may not be read."""
    try:
        with open(path, "rb", opener=plain_files.open_plain) as file:
            whole = True
            while line := file.readline(LONGEST):
                if whole and line.strip():
                    yield line
                whole = line.endswith(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror}") from None


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line of JSON holds, None where it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return found if isinstance(found, dict) else None
