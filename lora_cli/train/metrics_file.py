"""metrics.jsonl of a run: what Trainer logs of it, a line of JSON each time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.common import files, provenance
from lora_cli.train import saved_state


class Metrics:
    """The file; its lines are counted, so that a run that goes on cuts it to those of its
    checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / provenance.METRICS
        self.lines = 0

    def begin(self) -> None:
        """Empty it, for a run that begins."""
        files.write_text(self.file, "")

    def add(self, step: int, logs: Mapping[str, Any]) -> None:
        """Append what is logged after a step."""
        # JSON knows no infinity
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in logs.items()
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        self.lines += 1

    def flush(self) -> int:
        """Bring the file to the disk; return its lines."""
        if self.lines:
            with self.file.open("rb") as file:
                os.fsync(file.fileno())
        return self.lines

    def cut(self, lines: int) -> list[dict[str, Any]]:
        """Drop the lines that were logged after the checkpoint that a run goes on from; return
        what the others say."""
        logged = saved_state.cut_lines(self.file, lines)
        self.lines = len(logged)
        return logged
