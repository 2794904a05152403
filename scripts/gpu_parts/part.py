"""What parts are made of: cases by name, and what a case is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts.clock import Clock

Figures = dict[str, Any]
"""What a case has found, as JSON holds it."""


class NotHereError(Exception):
    """A case cannot be measured on this machine; the text says why. It is no failure."""


class Bench(NamedTuple):
    """What every case is given."""

    clock: Clock
    scratch: Path
    """A folder that all parts share: models, rows, references."""
    tiny: Path
    """The folder of the tiny model and its rows."""
    small: bool
    """Whether this is a dry run: shapes that a processor gets through."""
    report: Path
    """What earlier parts have found."""

    def read_earlier(self, part: str, case: str) -> Figures:
        """Return what an earlier part found in a case; nothing where it did not end well."""
        cases = self.read_part(part)
        return cases.get(case, {}).get("figures") or {}

    def read_part(self, part: str) -> dict[str, Any]:
        """Return all cases of an earlier part."""
        if not self.report.is_file():
            return {}
        parts = json.loads(self.report.read_text(encoding="utf-8"))["parts"]
        found: dict[str, Any] = parts.get(part, {}).get("cases", {})
        return found


class Case(NamedTuple):
    """One thing that is checked or measured."""

    measure: Callable[[Bench], Figures]
    seconds: float = 45
    """After so long it is taken to hang."""
