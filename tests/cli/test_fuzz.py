"""The short form of tests/torture/fuzz.py: some cases of each kind, and every case that was ever a
find.

Hermetic, in a process of its own, whose memory is limited. Alone: pytest tests/cli/test_fuzz.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "torture" / "fuzz.py"
# What found something once: a recipe that is a text, with --set (it never ended); keys with line
# breaks; adapters whose sections are no mappings, which nest too deep, or want Megatron
FINDS = {"recipes": [262, 2730, 4536, 5019, 6342], "data": [], "adapters": [11, 31, 47, 151]}
SHORT = {"recipes": 30, "data": 40, "adapters": 20}


@pytest.mark.parametrize("kind", SHORT)
def test_no_case_gets_a_traceback_hangs_or_takes_a_gigabyte(kind: str, tiny: Path) -> None:
    numbers = [*range(100_000, 100_000 + SHORT[kind]), *FINDS[kind]]
    code = f"import sys; sys.path[:0] = [{str(FUZZ.parent)!r}, {str(FUZZ.parents[2])!r}]; import fuzz\n"
    code += f"for number, outcome in fuzz.work({kind!r}, {numbers}): print(number, outcome.kind)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(map(int, ends)) == numbers
    assert {end for end in ends.values()} == {"accepted", "refused"}, ends
