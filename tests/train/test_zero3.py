"""`distributed.strategy: deepspeed-zero3` without its package, and `deepspeed-zero2`.

What it trains: tests/distributed/test_same_run.py. Hermetic. Alone: pytest tests/train/test_zero3.py
"""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_cli.common import UsageError
from lora_cli.recipe import load
from lora_cli.train import zero3
from tests.conftest import ROOT

ZERO3 = "distributed.strategy=deepspeed-zero3"


@pytest.mark.parametrize("version", ["0.16.4", "0.20.0"])
def test_another_deepspeed_is_refused_before_anything_starts(
    version: str, lora, write_recipe, tmp_path: Path
) -> None:
    found = tmp_path / f"deepspeed-{version}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = ["train", write_recipe(), "--nproc", "2", "--set", ZERO3]
    done = lora(*arguments, env={"PYTHONPATH": paths})
    assert done.returncode == 2
    assert f"strategy needs DeepSpeed <0.20,>=0.19.8, and here is {version}" in done.stderr
    assert "hint: pip install 'lora-cli[deepspeed]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, write_recipe) -> None:
    def find(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)
    recipe = load.load_recipe(write_recipe("distributed: {strategy: deepspeed-zero3}\n"))
    with pytest.raises(
        UsageError, match=r":2: distributed\.strategy needs DeepSpeed, which is not"
    ):
        zero3.refuse_absence(recipe)


def test_the_version_is_that_of_the_extra_and_its_lowest_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["deepspeed"])
    assert wanted.specifier == zero3.VERSIONS
    tested = re.search(r"^deepspeed==(.+)$", (ROOT / "lora_cli/constraints.txt").read_text(), re.M)
    assert tested[1] in zero3.VERSIONS


def test_one_process_needs_no_deepspeed_and_zero2_is_said_to_be_ddp(lora, write_recipe) -> None:
    recipe = write_recipe()
    said = "distributed.strategy: deepspeed-zero2 is ddp here"
    done = lora("train", recipe, "--nproc", "1", "--set", ZERO3)
    assert done.returncode == 0, done.stderr
    assert said not in done.stderr
    done = lora("plan", recipe, "--set", "distributed.strategy=deepspeed-zero2")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_experts_that_are_modules_of_their_own_are_refused(write_recipe) -> None:
    recipe = load.load_recipe(write_recipe("distributed: {strategy: deepspeed-zero3}\n"))
    zero3.refuse_experts(recipe, Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4)))
    network = LlamaForCausalLM(LlamaConfig(**SMALL))
    zero3.refuse_experts(recipe, network)
    network.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    with pytest.raises(
        UsageError, match=r"strategy: .*cannot gather model\.layers\.0\.mlp\.experts:"
    ):
        zero3.refuse_experts(recipe, network)
