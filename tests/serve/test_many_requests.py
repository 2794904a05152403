"""`lora serve` under load: 200 requests at a time, 10 MB of them, half-sent, not read: no wrong
answer, a status for each, and the server ends in order. No time is asserted.

Hermetic: the tiny model on a free port. Alone: pytest -m slow tests/serve/test_many_requests.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.serving import ROOT, make_adapter


@pytest.mark.slow
def test_no_answer_is_wrong_and_none_is_lost(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny / "model", tmp_path / "adapter", 1)
    words = [adapter, "--requests", "200", "--checked", "--", "--max-requests", "256"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_serve.py", *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (.+?) \| (\d+) ", done.stdout, re.MULTILINE)
    assert len(rows) == 8
    assert ("200 at a time", "200", "200", "-", "0") in rows
    peaks = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+) \|$", done.stdout, re.M)]
    assert peaks[-1] < peaks[0] + 400  # MiB
