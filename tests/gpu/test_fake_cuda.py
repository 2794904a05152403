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
    "lora": {"forward": 193, "backward": 223},
    "lora, dropout": {"forward": 221, "backward": 248},
    "lora, checkpointing": {"forward": 193, "backward": 390},
    "lora, float16": {"forward": 193, "backward": 223},
    "lora, float32": {"forward": 178, "backward": 184},
    "lora, stock head": {"forward": 170, "backward": 223},
    "lora, sdpa": {"forward": 219, "backward": 221},
    "lora, padded": {"forward": 212, "backward": 221},
    "dora": {"forward": 361, "backward": 293},
    "dora, dropout": {"forward": 459, "backward": 426},
    "dora, float16": {"forward": 361, "backward": 293},
    "dora, checkpointing": {"forward": 361, "backward": 628},
    "qlora": {"forward": 193, "backward": 256},
    "qlora, dropout": {"forward": 221, "backward": 281},
    "qlora, float16": {"forward": 193, "backward": 256},
    "qlora, checkpointing": {"forward": 193, "backward": 432},
    "qdora": {"forward": 403, "backward": 326},
    "qdora, dropout": {"forward": 602, "backward": 469},
    "qdora, float16": {"forward": 403, "backward": 326},
    "qdora, checkpointing": {"forward": 403, "backward": 712},
    "q_proj and embeddings": {"forward": 139, "backward": 169},
    "sft": {"forward": 450, "optimizer": 134},
    "sft, padded": {"forward": 467, "optimizer": 134},
    "sft, data set packed": {"forward": 474, "optimizer": 134},
    "sft, stock head": {"forward": 504, "optimizer": 134},
    "trainer": {"forward": 450, "optimizer": 134},
    "trainer, padded": {"forward": 467, "optimizer": 134},
    "trainer, adapted head": {"forward": 280, "optimizer": 46},
    "sft, qdora": {"forward": 777, "optimizer": 190},
    "generate, lora": {"forward": 216},
    "generate, dora": {"forward": 454},
}
"""Of two layers, the head and the loss. Fewer are welcome, and to be written here. A trainer's
micro-batch goes forward and backward in one."""
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
    assert found["kernels"] == KERNELS[case]
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
