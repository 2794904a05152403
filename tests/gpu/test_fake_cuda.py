"""A training step of each method on fake CUDA tensors: no wrong device, no kernel of the CPU's, no
float32 where 16 bits are meant, and as many kernels and waits as are written here.

Needs a C++ compiler; no GPU. Seconds. Alone: pytest -m slow tests/gpu/test_fake_cuda.py;
`python -m tests.gpu.fake_cuda MODEL` prints what it sees.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
KERNELS = {
    "lora": {"forward": 144, "backward": 135},
    "lora, dropout": {"forward": 172, "backward": 160},
    "lora, checkpointing": {"forward": 144, "backward": 247},
    "lora, float16": {"forward": 144, "backward": 135},
    "lora, float32": {"forward": 153, "backward": 140},
    "lora, stock head": {"forward": 121, "backward": 135},
    "lora, sdpa": {"forward": 170, "backward": 141},
    "lora, padded": {"forward": 163, "backward": 141},
    "dora": {"forward": 312, "backward": 205},
    "dora, dropout": {"forward": 424, "backward": 366},
    "dora, float16": {"forward": 312, "backward": 205},
    "dora, checkpointing": {"forward": 312, "backward": 485},
    "qlora": {"forward": 144, "backward": 168},
    "qlora, dropout": {"forward": 172, "backward": 193},
    "qlora, float16": {"forward": 144, "backward": 168},
    "qlora, checkpointing": {"forward": 144, "backward": 289},
    "qdora": {"forward": 354, "backward": 238},
    "qdora, dropout": {"forward": 595, "backward": 437},
    "qdora, float16": {"forward": 354, "backward": 238},
    "qdora, checkpointing": {"forward": 354, "backward": 569},
    "q_proj and embeddings": {"forward": 102, "backward": 92},
    "sft": {"forward": 313, "optimizer": 134},
    "sft, padded": {"forward": 338, "optimizer": 134},
    "sft, data set packed": {"forward": 345, "optimizer": 134},
    "sft, stock head": {"forward": 367, "optimizer": 134},
    "trainer": {"forward": 313, "optimizer": 134},
    "trainer, padded": {"forward": 338, "optimizer": 134},
    "trainer, adapted head": {"forward": 178, "optimizer": 46},
    "sft, qdora": {"forward": 640, "optimizer": 190},
    "generate, lora": {"forward": 216},
    "generate, dora": {"forward": 454},
}
"""Of two layers, the head and the loss. Fewer are welcome, and to be written here. A trainer's
micro-batch goes forward and backward in one."""
CASTS = {
    "lora": {"forward": 18, "backward": 1},
    "lora, dropout": {"forward": 18, "backward": 1},
    "lora, checkpointing": {"forward": 18, "backward": 15},
    "lora, float16": {"forward": 18, "backward": 1},
    "lora, float32": {"forward": 1, "backward": 0},
    "lora, stock head": {"forward": 18, "backward": 1},
    "lora, sdpa": {"forward": 18, "backward": 1},
    "lora, padded": {"forward": 19, "backward": 1},
    "dora": {"forward": 46, "backward": 15},
    "dora, dropout": {"forward": 74, "backward": 79},
    "dora, float16": {"forward": 46, "backward": 15},
    "dora, checkpointing": {"forward": 46, "backward": 57},
    "qlora": {"forward": 18, "backward": 1},
    "qlora, dropout": {"forward": 18, "backward": 1},
    "qlora, float16": {"forward": 18, "backward": 1},
    "qlora, checkpointing": {"forward": 18, "backward": 15},
    "qdora": {"forward": 46, "backward": 15},
    "qdora, dropout": {"forward": 127, "backward": 97},
    "qdora, float16": {"forward": 46, "backward": 15},
    "qdora, checkpointing": {"forward": 46, "backward": 57},
    "q_proj and embeddings": {"forward": 8, "backward": 3},
    "sft": {"forward": 19, "optimizer": 2},
    "sft, padded": {"forward": 20, "optimizer": 2},
    "sft, data set packed": {"forward": 19, "optimizer": 2},
    "sft, stock head": {"forward": 21, "optimizer": 2},
    "trainer": {"forward": 19, "optimizer": 2},
    "trainer, padded": {"forward": 20, "optimizer": 2},
    "trainer, adapted head": {"forward": 10, "optimizer": 2},
    "sft, qdora": {"forward": 61, "optimizer": 2},
    "generate, lora": {"forward": 42},
    "generate, dora": {"forward": 70},
}
"""Of those, what changes a type."""
READ = "a number is read at"
ANSWER = {
    f"{READ} lora_cli/evaluate/hf_answerers.py in _generate": 2,
    f"{READ} lora_cli/evaluate/hf_answerers.py in write_ids": 6,
}
WAITS = {
    **{case: ANSWER for case in KERNELS if case.startswith("generate")},
    # transformers and TRL read what they log of each micro-batch
    "sft, stock head": {f"{READ} lora_cli/train/objectives.py in compute_loss": 5},
}
"""What waits for the GPU; nothing does in a pass of the network or a step of the optimiser."""
FLOAT32 = ("lora, float32", "sft, stock head", "generate, lora")
"""Where products are in float32: as asked for, of TRL's head, and of PEFT's adapters in answers."""
pytestmark = pytest.mark.slow


def run(tiny: Path, *cases: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Return what the program saw of each case.

    One processor's C library has aborted it once: the cases that are missing then are made by
    another process, as long as each makes some.
    """
    seen: dict[str, dict[str, Any]] = {}
    while missing := [case for case in cases or KERNELS if case not in seen]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.fake_cuda", str(tiny / "model"), *missing],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        made = {found["case"]: found for found in map(json.loads, done.stdout.splitlines())}
        said = f"{done.returncode}, after {done.stdout}: {done.stderr[-6000:]}"
        assert made and done.returncode in (0, -signal.SIGABRT), said
        seen |= made
    return seen


@pytest.fixture(scope="module")
def seen(tiny: Path) -> dict[str, dict[str, Any]]:
    return run(tiny)


@pytest.mark.parametrize("case", KERNELS)
def test_a_step_is_made_on_the_device(seen: dict[str, dict[str, Any]], case: str) -> None:
    found = seen[case]
    assert "breaks" not in found, found["breaks"]
    assert not found["for_cpu"]
    assert found["kernels"] == KERNELS[case]
    assert found["casts"] == CASTS[case]
    assert found["waits"] == WAITS.get(case, {})
    wide = {name for name in found["wide"] if "dora_norms" not in name}  # norms are float32's
    assert bool(wide) is (case in FLOAT32), wide


def test_faults_that_were_there_once_are_seen(tiny: Path) -> None:
    for found in run(tiny, "lora", "dora", BROKEN="moved last").values():
        assert "breaks" in found or found["for_cpu"]
    found = run(tiny, "lora", BROKEN="mask")["lora"]
    assert any("by a mask at lora_cli/speed/loss_head.py" in wait for wait in found["waits"])
    for found in run(tiny, "dora", "qdora", BROKEN="factor").values():
        assert any("lora_cli/speed/fused_layer.py" in product for product in found["wide"])


def test_a_step_is_made_on_apples_gpu(tiny: Path) -> None:
    cases = (
        "lora",
        "lora, dropout",
        "lora, checkpointing",
        "lora, padded",
        "dora",
        "sft",
        "trainer",
    )
    found = run(tiny, *cases, FAKE="mps")
    assert not [each for each in found.values() if "breaks" in each or each["for_cpu"]]
    # the base is tried there in its own type, and the step's numbers are read at once
    assert {case: each["waits"] for case, each in found.items() if each["waits"]} == dict.fromkeys(
        ("sft", "trainer"), {f"{READ} lora_cli/train/step_numbers.py in read": 2}
    )
