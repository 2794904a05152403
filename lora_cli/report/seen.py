"""What is read of the records of runs and of what was made from them.

A record may be of another version: what it lacks is not recorded, what it has beyond is left.
Light: `models.TrainingRecord`, by which a run goes on, would load torch.
"""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_cli.common import format_duration, privacy, stored


class SeenBase(stored.Stored):
    """The base that a run trains on."""

    name: str = ""
    commit: str | None = None
    fingerprint: dict[str, Any] | None = None
    made_from: dict[str, Any] | None = None

    @property
    def source(self) -> str:
        """The GGUF file that it was dequantised from, in words; empty for any other base."""
        if not self.made_from:
            return ""
        file, kind, dtype = (str(self.made_from.get(key)) for key in ("file", "type", "dtype"))
        return f"dequantised from {Path(file).name} ({kind}) to {dtype}"


class SeenRun(stored.Stored):
    """The record of a run, as far as it is shown."""

    id: str | None = None
    command: str = ""
    status: str = "unknown"
    started: str = ""
    updated: str | None = None
    versions: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    base: SeenBase = SeenBase()
    parent: dict[str, Any] | None = None
    device: dict[str, Any] | None = None
    processes: int = 1
    data: dict[str, Any] | None = None
    holdout: dict[str, Any] | None = None
    kept: dict[str, Any] | None = None
    parameters: dict[str, Any] = {}
    reduced: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None
    resumed: list[str] = []
    changed: list[str] = []

    @classmethod
    def read_run(cls, path: Path) -> SeenRun:
        """Return the record in a file; LoraError where it cannot be read, DamagedError where it is
        that of no run."""
        record = cls.read(path)
        if not {"recipe", "base", "status"} & record.model_fields_set:
            raise stored.explain_damage(path, "it says of no run what that trained on")
        return record

    def is_before_it_went_on(self, time: str) -> bool:
        """Return whether a time, in ISO 8601, is from before the run was resumed last; what was
        made of its adapter then was made of another one."""
        made, resumed = parse_time(time), parse_time(self.resumed[-1] if self.resumed else None)
        return bool(made and resumed and made < resumed)

    def get(self, section: str, key: str) -> Any:
        """Return a value of the resolved recipe, None where that has none."""
        found = self.recipe.get(section)
        return found.get(key) if isinstance(found, dict) else None

    @property
    def method(self) -> str:
        """Such as `lora`; empty where it is not recorded."""
        found = self.recipe.get("method")
        return found if isinstance(found, str) else ""

    @property
    def short_base(self) -> str:
        """The base's name on the hub, or the last part of its folder's."""
        parts = Path(privacy.expand_home(self.base.name)).parts
        if len(parts) <= 2 and not self.base.name.startswith(("/", "~", ".")):
            return self.base.name
        return parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1]

    @property
    def duration(self) -> float | None:
        """Seconds that training took, else from its beginning to its record's last change."""
        if (said := number((self.results or {}).get("duration_s"))) is not None:
            return said
        began, ended = parse_time(self.started), parse_time(self.updated)
        return (ended - began).total_seconds() if began and ended else None

    @property
    def is_timed_in_part(self) -> bool:
        """Whether the duration is that since the run was resumed last."""
        return bool(self.resumed) and number((self.results or {}).get("duration_s")) is not None

    @property
    def took(self) -> str:
        """The duration in words."""
        if self.duration is None:
            return ""
        part = " since it was resumed" if self.is_timed_in_part else ""
        return f"{format_duration(self.duration)}{part}"


class SeenMade(stored.Stored):
    """The record of a merged model or of a GGUF file."""

    command: str = ""
    started: str = ""
    versions: dict[str, str] = {}
    type: str | None = None
    llama_cpp: str | None = None
    base: str | None = None
    into: str | None = None
    checked: dict[str, Any] | str | None = None
    figures: dict[str, Any] | None = None
    parent: dict[str, Any] | None = None

    @property
    def run_id(self) -> str | None:
        """The id of the run whose adapter it was made from, also by way of a merged model."""
        parent, seen = self.parent, 0
        while isinstance(parent, dict) and seen < 5:
            if isinstance(found := parent.get("id"), str):
                return found
            parent, seen = parent.get("parent"), seen + 1
        return None


def number(value: Any) -> float | None:
    """Return a number of a file as such, None for anything else, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None


def parse_time(text: Any) -> datetime | None:
    """Return a time in ISO 8601, None for what is none."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else None
