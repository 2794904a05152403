"""What `all-linear` means on a model that PEFT refuses, or of which text is a part. Hermetic. Alone:
pytest tests/models/test_all_linear.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_cli.models import targets
from lora_cli.recipe import load
from tests import architectures
from tests.units import same_sum


def settle(recipe_text: str, write_recipe, network, config: LoraConfig) -> str:
    recipe = load.load_recipe(write_recipe(recipe_text))
    return targets.settle_targets(recipe, network, config)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"])
def test_what_peft_refuses_in_a_state_space_model_is_left_out(write_recipe, family: str) -> None:
    network = architectures.make_model(family)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(architectures.make_model(family), LoraConfig(target_modules="all-linear"))
    config = LoraConfig(target_modules="all-linear")
    said = settle("", write_recipe, network, config)
    assert "of out_proj, which PEFT does not adapt in a state-space model" in said
    adapted = get_peft_model(network, config)
    names = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    linear = {
        f"base_model.model.{name}"
        for name, module in architectures.make_model(family).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    head = {name for name in linear if name.endswith("lm_head")}
    out = {name for name in linear if name.endswith(".out_proj")}
    assert out
    assert names == linear - head - out


def test_modules_that_are_named_are_not_left_out(write_recipe) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    assert settle("", write_recipe, architectures.make_model("llama"), config) == ""
    assert config.target_modules == {"q_proj"}
    config = LoraConfig(target_modules="all-linear")
    assert settle("", write_recipe, architectures.make_model("llama"), config) == ""
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "opt", "gpt_neox", "bamba"])
def test_other_shapes_than_llamas_train_and_merge_as_in_peft(
    lora, write_recipe, tiny: Path, tmp_path: Path, family: str
) -> None:
    base = architectures.make_folder(family, tmp_path / family, tiny / "model")
    recipe = write_recipe(
        f"model: {{name_or_path: {base}}}\n"
        "training: {max_steps: 2, learning_rate: 1e-2, lr_scheduler_type: constant, max_length: 64}\n"
    )
    for words in (
        ("train", recipe),
        ("merge", tmp_path / "run/adapter", tmp_path / "merged"),
        ("verify", tmp_path / "run/adapter", tmp_path / "merged"),
        ("generate", tmp_path / "run/adapter", "--prompt", "a b", "--max-new-tokens", "2"),
    ):
        done = lora(*words)
        assert done.returncode == 0, done.stderr
    network = AutoModelForCausalLM.from_pretrained(base)
    plain = PeftModel.from_pretrained(network, str(tmp_path / "run/adapter")).merge_and_unload()
    plain.save_pretrained(tmp_path / "plain")
    wanted = load_file(tmp_path / "plain/model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == wanted.keys()
    assert all(same_sum(merged[name], tensor) for name, tensor in wanted.items())
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in merged.items())
