"""What was trained and merged, convolutions and embeddings among it, is what the formulas make of the
adapter's file: the reference knows neither PEFT's layers nor how weights are merged here.

Hermetic: random bases of two layers, CPU. Alone: pytest tests/doctor/test_trained.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from lora_cli.doctor.reference.tree import LoraModel
from lora_cli.merge.merge import merge
from lora_cli.models import make_inputs, make_probes, read_adapter, read_logits
from lora_cli.recipe import load_recipe
from lora_cli.train import run
from tests import pictures, tasks

UNIT = torch.finfo(torch.float32).eps


def train(folder: Path, kind: str, method: str) -> Path:
    if kind == "Conv2d":
        base = pictures.make_base(folder / "base", "resnet")
        return run.train(load_recipe(pictures.write_recipe(folder, base, method)))
    base = tasks.make_base(folder / "base", "bert")
    targets = ", target_modules: [word_embeddings, query]"
    recipe = tasks.write_recipe(folder, "sequence_classification", base, method, lora=targets)
    return run.train(load_recipe(recipe))


def make_reference(adapter: Path, folder: Path) -> tuple[LoraModel, dict[str, torch.Tensor]]:
    """The base in float64 with the reference's layers, which have the adapter's numbers; and what
    it holds whole beside them, by the base's names."""
    read = read_adapter(adapter)
    auto = getattr(transformers, read.base.task.auto_class)
    network = auto.from_pretrained(read.base.name, config=AutoConfig.from_pretrained(adapter))
    stored = load_file(adapter / "adapter_model.safetensors")
    factors = {name: each.double() for name, each in stored.items() if ".lora_" in name}
    whole = {
        name.removeprefix("base_model.model."): each
        for name, each in stored.items()
        if name not in factors
    }
    network.load_state_dict(whole, strict=False)
    (folder / "factors").mkdir()
    save_file(factors, folder / "factors" / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_text()
    (folder / "factors" / "adapter_config.json").write_text(config)
    targets = json.loads(config)["target_modules"]
    reference = LoraModel(network.double().eval(), targets, r=1, lora_alpha=1)
    reference.swap_adapter(folder / "factors")
    return reference.eval(), whole


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["Conv2d", "Embedding"])
def test_what_is_merged_is_what_the_formulas_say(tmp_path: Path, kind: str, method: str) -> None:
    adapter = train(tmp_path, kind, method)
    merge(adapter, tmp_path / "merged", None, None, False)
    reference, whole = make_reference(adapter, tmp_path)
    adapted = {path: layer for path, layer in reference.layers.items()}
    kinds = {type(layer.base) for layer in adapted.values()}
    assert getattr(nn, kind) in kinds and len(adapted) >= 3
    read = read_adapter(adapter)
    empty = read.base.build_empty()
    inputs = [make_inputs(empty, probe) for probe in make_probes(read.load_reader())]
    with torch.no_grad():
        wanted = torch.cat([read_logits(reference(**each)) for each in map(to_double, inputs)])
    before = {path: layer.weight.detach().clone() for path, layer in adapted.items()}
    plain = reference.merge().state_dict()
    made = load_merged(adapter, tmp_path / "merged")
    found = made.state_dict()
    assert found.keys() == plain.keys()
    for path in adapted:
        name = f"{path}.weight"
        apart = (found[name].double() - plain[name]).abs().max().item()
        assert apart <= 8 * UNIT * plain[name].abs().max().item(), name
        assert (plain[name] - before[path]).abs().max().item() > 1e-4  # else nothing is shown
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        given = torch.cat([read_logits(made(**each)) for each in inputs])
    assert (given - wanted).abs().max().item() <= 2e-5 * wanted.std().item()


def to_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: each.double() if each.is_floating_point() else each for name, each in inputs.items()
    }


def load_merged(adapter: Path, folder: Path) -> nn.Module:
    auto = getattr(transformers, read_adapter(adapter).base.task.auto_class)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()
