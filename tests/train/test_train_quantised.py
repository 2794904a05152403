"""Training on bases that are quantised already: NF4 as it is, FP8 dequantised; stopped and resumed;
merged, with what was trained checked.

Hermetic: the tiny model, quantised here. Alone: pytest tests/train/test_train_quantised.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_cli.common.errors import LoraError
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.merge.merge import merge
from lora_cli.models import read_adapter
from lora_cli.models.quantised import find_quantised
from lora_cli.recipe import load
from lora_cli.train import run
from lora_cli.train.trainers import Watched
from tests import quantised, units

SHORT = "lora: {r: 4}\ntraining: {max_steps: 4, save_strategy: steps, save_steps: 2}\n"


def train_on(write_recipe, base: Path, method: str, folder: Path, **how: bool) -> Path:
    path = write_recipe(
        f"method: {method}\nmodel: {{name_or_path: {base}}}\noutput_dir: {folder}\n{SHORT}"
    )
    return run.train(load.load_recipe(path), **how)


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_base_in_nf4_trains_as_it_is_and_merges_dequantised(
    tiny: Path, tmp_path: Path, write_recipe, method: str, capsys
) -> None:
    base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", **quantised.NF4)
    trained = train_on(write_recipe, base, method, tmp_path / "run")
    said = capsys.readouterr().err
    assert f"{method} on {base}, already quantised (bitsandbytes NF4) -> " in said
    key = "quantization.bnb_4bit_use_double_quant"
    assert f"{key} = false (auto: the base is quantised so already)" in said
    record = json.loads((trained / "lora_record.json").read_text())
    assert record["recipe"]["quantization"]["bnb_4bit_use_double_quant"] is False
    assert record["base"]["fingerprint"]["config"]["quantization_config"]["load_in_4bit"]
    found = read_adapter(trained)
    assert found.quantization is None, "nothing is quantised when it is loaded"
    assert find_quantised(found.load_base().config)
    merge(trained, tmp_path / "out")
    assert "base with adapter against the end of training: " in capsys.readouterr().err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    if method == "qlora":
        wanted = quantised.merge_plainly(base, trained)
        assert all(units.same_sum(weight, wanted[name]) for name, weight in merged.items())
    asked = [Asked([{"role": "user", "content": "Reverse: dog zoo"}])]
    opened = open_models([str(trained), str(base), str(tmp_path / "out")])
    answers = {path: each.answer(asked, Sampling(8, 0)) for path, each in opened.items()}
    assert len(answers) == 3 and answers[str(trained)] == answers[str(tmp_path / "out")]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_stopped_run_resumes_to_the_same_bytes(
    tiny: Path, tmp_path: Path, write_recipe, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "qlora":
        base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", **quantised.DOUBLY)
    else:
        base = quantised.save_fp8(tiny / "model", tmp_path / "base", (32, 32))
    whole = train_on(write_recipe, base, method, tmp_path / "whole")
    inner = Watched.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watched, "training_step", stop)
        train_on(write_recipe, base, method, tmp_path / "run")
    resumed = train_on(write_recipe, base, method, tmp_path / "run", resume=True)
    first, second = ((each / "adapter_model.safetensors").read_bytes() for each in (whole, resumed))
    assert first == second


def test_a_base_in_fp8_is_trained_dequantised(
    tiny: Path, tmp_path: Path, write_recipe, capsys
) -> None:
    base = quantised.save_fp8(tiny / "model", tmp_path / "base", (32, 32))
    trained = train_on(write_recipe, base, "lora", tmp_path / "run")
    assert "(FP8, blocks of 32 x 32), dequantised as it is loaded -> " in capsys.readouterr().err
    plain = tmp_path / "plain"  # the same values in a folder that is not quantised
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    network._weight_conversions = None  # transformers would write FP8 again
    network.save_pretrained(plain)
    quantised.copy_tokenizer(tiny / "model", plain)
    other = train_on(write_recipe, plain, "lora", tmp_path / "other")
    first, second = (load_file(each / "adapter_model.safetensors") for each in (trained, other))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_a_named_16bit_base_is_measured_by_what_training_left_where_the_base_is_gone(
    tiny: Path, tmp_path: Path, write_recipe, capsys
) -> None:
    base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", **quantised.NF4)
    trained = train_on(write_recipe, base, "qlora", tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(LoraError, match="is not here"):
        merge(trained, tmp_path / "out")
    merge(trained, tmp_path / "out", base=str(tiny / "model"))
    said = capsys.readouterr().err
    assert f"{tiny / 'model'} is not compared with {base}" in said
    assert "it lies this far from what was trained: " in said
