"""A base that fits no GPU is loaded and sharded over four processes, on fake CUDA tensors: this
process's GPU never has more of it than its part, what is outside of the blocks, and one block.

Needs a C++ compiler, and DeepSpeed for one case; no GPU. A minute. Nothing here has run on a real
card. Alone: pytest -m slow tests/gpu/test_sharded_loading.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT
from tests.distributed.jobs import find_packages

WORLD, LAYERS = 4, 12
SMALL = 16 << 10
"""Bytes of buffers and the like."""
NORMS = 2 * LAYERS * 8192
"""Bytes of DoRA's magnitudes and norms: of each row of each adapted weight one in float32."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with so many layers that they are nearly all of it."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny / "model", folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = LAYERS, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def count(deep: Path, strategy: str, method: str, **environment: str) -> dict[str, Any]:
    """Return what the program counted: of each phase the bytes at its end, and the most."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.sharded_loading", str(deep), strategy, method],
        cwd=ROOT, capture_output=True, encoding="utf-8",
        env={**os.environ, **find_packages(strategy), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def whole(deep: Path) -> dict[str, Any]:
    """What was counted when each process loaded the base whole, and what else a phase needs."""
    found = count(deep, "fsdp", "lora", BROKEN="whole")
    assert all(found[name][1] >= found["weights"] for name in ("loaded", "tried", "trainer"))
    assert found["sharded"][1] > found["weights"]
    return found


@pytest.mark.parametrize(("strategy", "method"), [("fsdp", "dora"), ("deepspeed-zero3", "lora")])
def test_a_gpu_never_has_more_than_its_part_and_a_block(
    strategy: str, method: str, deep: Path, whole: dict[str, Any]
) -> None:
    found = count(deep, strategy, method)
    assert found["weights"] == whole["weights"] > 10 * found["block"]
    assert found["attention"] == whole["attention"] == "varlen"  # chosen as on a GPU
    adapters = (whole["attached"][0] - whole["weights"]) // LAYERS
    block, outside = found["block"] + adapters, found["outside"]
    small = SMALL + NORMS * (method == "dora")
    for name in ("loaded", "tried", "attached", "trainer"):
        now, most = found[name]
        passed = whole[name][1] - whole[name][0]  # what passes need beside the weights
        assert now <= outside + small, name
        assert most <= outside + block + passed + small, name
    assert found["elsewhere"] == 0  # tensors that did not come to the GPU
    now, most = found["sharded"]
    part = found["own"]
    assert now <= part + adapters * LAYERS // WORLD + small
    assert most <= part + outside + block + small
    assert most < whole["sharded"][1] / 2
