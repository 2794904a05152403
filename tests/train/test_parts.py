"""A base with a tower for pictures, trained on text: its text model alone is adapted, and merging
keeps the rest. Against plain PEFT. Hermetic. Alone: pytest tests/train/test_parts.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lora_cli.common import LoraError
from lora_cli.recipe import load
from lora_cli.train import run as train
from tests import architectures
from tests.units import same_sum

FAMILIES = (
    "llava",  # refused as no model that writes text
    "qwen3_5",  # loaded without its tower
    pytest.param("gemma3", marks=pytest.mark.slow),
    pytest.param("mistral3", marks=pytest.mark.slow),
    pytest.param("qwen3_vl", marks=pytest.mark.slow),
    pytest.param("idefics3", marks=pytest.mark.slow),
    pytest.param("internvl", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_model_is_adapted_and_the_rest_is_kept(
    lora, write_recipe, tiny: Path, tmp_path: Path, family: str
) -> None:
    base = architectures.make_folder(family, tmp_path / "base", tiny / "model")
    recipe = write_recipe(
        f"model: {{name_or_path: {base}}}\n"
        "training: {max_steps: 2, learning_rate: 1e-2, lr_scheduler_type: constant}\n"
    )
    for words in (
        ("check", recipe),
        ("train", recipe),
        ("merge", tmp_path / "run/adapter", tmp_path / "merged"),
        ("verify", tmp_path / "run/adapter", tmp_path / "merged"),
        ("generate", tmp_path / "run/adapter", "--prompt", "a b", "--max-new-tokens", "2"),
    ):
        done = lora(*words)
        assert done.returncode == 0, done.stderr
        if words[0] in ("check", "train"):
            assert "which no text passes through" in done.stdout + done.stderr
    network = AutoModelForImageTextToText.from_pretrained(base)
    adapted = PeftModel.from_pretrained(network, str(tmp_path / "run/adapter"))
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert names
    text = network.get_decoder()
    inside = next(name for name, module in adapted.named_modules() if module is text)
    assert all(name.startswith(f"{inside}.") for name in names)
    adapted.merge_and_unload().save_pretrained(tmp_path / "plain")
    before, wanted, merged = (
        load_file(folder / "model.safetensors")
        for folder in (base, tmp_path / "plain", tmp_path / "merged")
    )
    assert merged.keys() == before.keys() == wanted.keys()
    assert all(same_sum(merged[name], tensor) for name, tensor in wanted.items())
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(names)


def test_adapted_modules_that_training_left_as_they_were_are_named(
    lora, write_recipe, tiny: Path, tmp_path: Path
) -> None:
    base = architectures.make_folder("llava", tmp_path / "base", tiny / "model")
    recipe = write_recipe(
        f"model: {{name_or_path: {base}}}\nlora: {{target_modules: [gate_proj, fc1]}}\n"
        "training: {max_steps: 2, learning_rate: 1e-2, lr_scheduler_type: constant}\n"
    )
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 adapted modules were not trained (fc1): their B is zero" in done.stderr
    trained = write_recipe("training: {max_steps: 2}\noutput_dir: " + str(tmp_path / "other"), "b")
    assert "were not trained" not in lora("train", trained).stderr


def test_an_adapter_that_would_change_nothing_is_not_saved(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As of an engine that loses gradients; where no step had a learning rate, that is said
    only."""
    text = f"training: {{max_steps: 2}}\noutput_dir: {tmp_path / 'out'}\n"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: None)
        with pytest.raises(LoraError, match="every B is still zero"):
            train.train(load.load_recipe(write_recipe(text)))
    assert not (tmp_path / "out" / "adapter").exists()
    assert json.loads((tmp_path / "out" / "record.json").read_text())["status"] == "failed"
    text = f"training: {{max_steps: 1}}\noutput_dir: {tmp_path / 'other'}\n"
    train.train(load.load_recipe(write_recipe(text)))
    assert "no step had a learning rate" in capsys.readouterr().err
