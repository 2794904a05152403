"""A training step of each method on fake CUDA tensors: no wrong device, no kernel of the CPU's, no
float32 where 16 bits are meant, and as many kernels and waits as are written here.

Needs a C++ compiler; no GPU. Seconds. Alone: pytest -m slow tests/gpu/test_fake_cuda.py;
`python -m tests.gpu.fake_cuda MODEL` prints what it sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
KERNELS = {
    "lora": (234, 232),
    "lora, dropout": (248, 243),
    "lora, checkpointing": (234, 448),
    "lora, float16": (234, 232),
    "lora, float32": (193, 195),
    "lora, stock head": (210, 232),
    "dora": (458, 402),
    "dora, dropout": (486, 424),
    "q_proj and embeddings": (168, 169),
}
"""Of two layers, the head and the loss: forward, and backward. Fewer are welcome, and to be written
here."""
WAIT = {"nonzero at lora_cli/speed/loss_head.py in forward": 1}
pytestmark = pytest.mark.slow


def run(tiny: Path, *cases: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Return what the program saw of each case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.fake_cuda", str(tiny / "model"), *cases],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}, after {done.stdout}: {done.stderr[-6000:]}"
    return {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def seen(tiny: Path) -> dict[str, dict[str, Any]]:
    return run(tiny)


@pytest.mark.parametrize("case", KERNELS)
def test_a_step_is_made_on_the_device(seen: dict[str, dict[str, Any]], case: str) -> None:
    found = seen[case]
    assert "breaks" not in found, found["breaks"]
    assert not found["for_cpu"]
    assert (found["kernels"]["forward"], found["kernels"]["backward"]) == KERNELS[case]
    assert found["waits"] == ({} if "stock" in case else WAIT)
    wide = {name for name in found["wide"] if "dora_norms" not in name}  # norms are float32's
    assert bool(wide) is ("float32" in case), wide


def test_a_base_that_is_moved_after_the_levers_are_chosen_is_seen(tiny: Path) -> None:
    # as it was: Trainer moved a base that had been looked at on the CPU
    for found in run(tiny, "lora", "dora", MOVED_LAST="1").values():
        assert "breaks" in found or found["for_cpu"]
