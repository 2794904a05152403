"""What a check of `lora doctor` found, and the versions that mend it.

Imports none of the libraries that are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

TESTED = Path(__file__).parent.parent / "constraints.txt"


class Check(NamedTuple):
    """One finding: `problem` where a recipe would fail or go wrong, `note` for what one should
    know."""

    name: str
    status: Literal["ok", "note", "problem"]
    said: str
    fix: str | None = None


def read_tested_versions() -> dict[str, str]:
    """Read the tested set for this Python: package -> version."""
    from packaging.requirements import Requirement

    lines = [
        line.partition(" #")[0]
        for line in TESTED.read_text().splitlines()
        if line and line[0] != "#"
    ]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: next(iter(pin.specifier)).version for pin in pins}


def name_fix(*names: str) -> str:
    """Return the command that installs the tested versions of packages."""
    tested = read_tested_versions()
    return "python -m pip install " + " ".join(f"{name}=={tested[name]}" for name in names)
