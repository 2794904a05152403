"""A short form of tests/torture/signals.py: signals and kills at random instants of some verbs.

Hermetic: the tiny model. Linux. Alone: pytest tests/common/test_signals.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TORTURE = ROOT / "tests" / "torture" / "signals.py"


@pytest.mark.slow
def test_signals_and_kills_at_random_instants_leave_nothing(tiny: Path) -> None:
    verbs = ["merge two", "convert", "setup-llama-cpp", "check"]
    command = [sys.executable, TORTURE, "--signals", "24", "--kills", "8", "--verbs", *verbs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "0 faults" in last and " ended" in last and " killed" in last
