"""Output of any encoding takes any text: marks have ASCII twins, and nothing crashes.

Hermetic. Alone: pytest tests/common/test_ui.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MARKS = "⟦answer⟧ |Δlogit| 3 × 4 … 東 🙂"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"[[answer]] |delta logit| 3 x 4 ... \u6771 \U0001f642"),
        ("cp1252", r"[[answer]] |delta logit| 3 × 4 … \u6771 \U0001f642"),
        ("utf-8", MARKS),
    ],
)
def test_marks_have_twins_and_the_rest_is_escaped(encoding: str, shown: str) -> None:
    code = f"import sys\nfrom lora_cli.common import ui\nui.fit_to_encoding()\nprint({MARKS!r})\nui.say({MARKS!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.decode(encoding).rstrip() == shown
    assert done.stderr.decode(encoding).rstrip() == shown


def test_check_shows_its_rows(lora, write_recipe) -> None:
    done = lora("check", write_recipe(), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "[[" in done.stdout
