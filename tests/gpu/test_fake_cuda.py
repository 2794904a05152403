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
    "lora": {"forward": 179, "backward": 223},
    "lora, dropout": {"forward": 207, "backward": 248},
    "lora, checkpointing": {"forward": 179, "backward": 376},
    "lora, float16": {"forward": 179, "backward": 223},
    "lora, float32": {"forward": 178, "backward": 184},
    "lora, stock head": {"forward": 156, "backward": 223},
    "lora, sdpa": {"forward": 205, "backward": 221},
    "lora, padded": {"forward": 198, "backward": 221},
    "dora": {"forward": 347, "backward": 293},
    "dora, dropout": {"forward": 459, "backward": 426},
    "dora, float16": {"forward": 347, "backward": 293},
    "dora, checkpointing": {"forward": 347, "backward": 614},
    "qlora": {"forward": 179, "backward": 256},
    "qlora, dropout": {"forward": 207, "backward": 281},
    "qlora, float16": {"forward": 179, "backward": 256},
    "qlora, checkpointing": {"forward": 179, "backward": 418},
    "qdora": {"forward": 389, "backward": 326},
    "qdora, dropout": {"forward": 602, "backward": 469},
    "qdora, float16": {"forward": 389, "backward": 326},
    "qdora, checkpointing": {"forward": 389, "backward": 698},
    "q_proj and embeddings": {"forward": 137, "backward": 169},
    "sft": {"forward": 436, "optimizer": 134},
    "sft, padded": {"forward": 453, "optimizer": 134},
    "sft, data set packed": {"forward": 460, "optimizer": 134},
    "sft, stock head": {"forward": 490, "optimizer": 134},
    "trainer": {"forward": 436, "optimizer": 134},
    "trainer, padded": {"forward": 453, "optimizer": 134},
    "trainer, adapted head": {"forward": 276, "optimizer": 46},
    "sft, qdora": {"forward": 763, "optimizer": 190},
    "generate, lora": {"forward": 216},
    "generate, dora": {"forward": 454},
}
"""Of two layers, the head and the loss. Fewer are welcome, and to be written here. A trainer's
micro-batch goes forward and backward in one."""
CASTS = {
    "lora": {"forward": 28, "backward": 37},
    "lora, dropout": {"forward": 28, "backward": 37},
    "lora, checkpointing": {"forward": 28, "backward": 61},
    "lora, float16": {"forward": 28, "backward": 37},
    "lora, float32": {"forward": 1, "backward": 0},
    "lora, stock head": {"forward": 28, "backward": 37},
    "lora, sdpa": {"forward": 28, "backward": 37},
    "lora, padded": {"forward": 29, "backward": 37},
    "dora": {"forward": 56, "backward": 51},
    "dora, dropout": {"forward": 84, "backward": 87},
    "dora, float16": {"forward": 56, "backward": 51},
    "dora, checkpointing": {"forward": 56, "backward": 103},
    "qlora": {"forward": 28, "backward": 37},
    "qlora, dropout": {"forward": 28, "backward": 37},
    "qlora, float16": {"forward": 28, "backward": 37},
    "qlora, checkpointing": {"forward": 28, "backward": 61},
    "qdora": {"forward": 56, "backward": 51},
    "qdora, dropout": {"forward": 129, "backward": 97},
    "qdora, float16": {"forward": 56, "backward": 51},
    "qdora, checkpointing": {"forward": 56, "backward": 103},
    "q_proj and embeddings": {"forward": 18, "backward": 17},
    "sft": {"forward": 65, "optimizer": 2},
    "sft, padded": {"forward": 66, "optimizer": 2},
    "sft, data set packed": {"forward": 65, "optimizer": 2},
    "sft, stock head": {"forward": 67, "optimizer": 2},
    "trainer": {"forward": 65, "optimizer": 2},
    "trainer, padded": {"forward": 66, "optimizer": 2},
    "trainer, adapted head": {"forward": 34, "optimizer": 2},
    "sft, qdora": {"forward": 107, "optimizer": 2},
    "generate, lora": {"forward": 42},
    "generate, dora": {"forward": 70},
}
"""Of those, what changes a type."""
READ = "a number is read at"
ANSWER = {
    f"{READ} lora_cli/evaluate/answerers.py in _generate": 6,
    f"{READ} lora_cli/evaluate/answerers.py in <listcomp>": 2,
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
        ("sft", "trainer"), {f"{READ} lora_cli/train/progress.py in read": 2}
    )
