"""DoRA's factored norms: PEFT's outputs and gradients, for every kind of linear layer, without the
full product.

Hermetic: random layers and the tiny model. Alone: pytest tests/speed/test_dora_norms.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

from lora_cli.models import attach
from lora_cli.models.base import Base
from lora_cli.recipe import load
from lora_cli.speed import dora_norms
from lora_cli.train import run
from tests.networks import IN, OUT, Layers

RANK = 4


def pair(network: torch.nn.Module, targets: list[str], **options) -> tuple[PeftModel, PeftModel]:
    """The network with PEFT's DoRA, far from where it starts, and a copy of it with factored
    norms."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, use_dora=True, **options)
    stock = get_peft_model(network, config)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data += (
                0.2 * torch.rand_like(parameter) * parameter.abs().mean().clamp(min=0.05)
            )
    factored = copy.deepcopy(stock)
    assert dora_norms.install(factored) == len(attach.find_lora_layers(stock))
    return stock, factored


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_peft_s(options: dict, training: bool) -> None:
    stock, factored = pair(Layers(), ["first", "second", "third"], **options)
    found = []
    for network in (stock, factored):
        torch.manual_seed(1)
        x = torch.randn(7, IN, requires_grad=True)
        out = network.train(training)(x)
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        found.append([out, x.grad, *(p.grad for p in network.parameters() if p.requires_grad)])
    assert len(found[0]) == 2 + 9
    for wanted, ours in zip(*found):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert (found[0][0] - Layers()(torch.randn(7, IN))).abs().max() > 0.1


def test_quantised_layers_are_peft_s(tiny: Path) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = Base(str(tiny / "model")).load(torch.float32, nf4)
    stock, factored = pair(base, ["q_proj", "down_proj"])
    ids = torch.arange(8, 40)[None]
    wanted, ours = (network(input_ids=ids).logits for network in (stock, factored))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    with stock.disable_adapter():
        assert (stock(input_ids=ids).logits - wanted).abs().max() > 0.1


class _Largest(TorchDispatchMode):
    """The most numbers in any result that is not what was given, seen otherwise."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        made = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)
        }
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, made.numel())
        return made


def test_nothing_as_large_as_the_weight_is_made() -> None:
    stock, factored = pair(Layers(), ["first"])
    x = torch.randn(3, IN)
    for network, whole in ((stock, True), (factored, False)):
        network(x)  # the norms of the base's rows are computed once
        with _Largest() as seen:
            network(x)
        assert (seen.largest >= IN * OUT) == whole


def test_norms_in_bfloat16_are_nearer_to_float64_than_peft_s() -> None:
    stock, factored = pair(Layers().to(torch.bfloat16), ["second"])
    layer, own = (network.base_model.model.second for network in (stock, factored))
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
    exact = (weight.double() + scaling * b.double() @ a.double()).norm(dim=1)
    ours = own.lora_magnitude_vector["default"].compute_norms(weight, a, b, scaling).double()
    theirs = (
        layer.lora_magnitude_vector["default"]
        .get_weight_norm(weight, (b @ a).to(weight.dtype), scaling)
        .double()
    )
    assert (ours - exact).abs().max() < 1e-3 * exact.max()
    assert (ours - exact).abs().max() < (theirs - exact).abs().max()


@pytest.mark.parametrize("method", ["dora", "qdora"])
def test_training_is_the_same_with_either(
    write_recipe, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for name in ("ours", "stock"):
        text = f"method: {method}\noutput_dir: {tmp_path / name}\ntraining: {{logging_steps: 1, max_steps: 6}}\n"
        if name == "stock":
            monkeypatch.setattr(dora_norms, "install", lambda adapted: 0)
        run.train(load.load_recipe(write_recipe(text)))
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 6


def test_norms_are_computed_once_where_they_are_kept_and_anew_after_it() -> None:
    _, factored = pair(Layers(), ["first"])
    layers = dora_norms.find_layers(factored)
    assert len(layers) == 1
    x, b = torch.randn(3, IN), factored.base_model.model.first.lora_B["default"].weight
    with dora_norms.keep_norms(layers), _Largest():
        before = factored(x)
        assert layers[0].norms is not None
        b.data *= 3  # what nobody does there, and what shows that they were not computed again
        kept = layers[0].norms.clone()
        factored(x)
        assert torch.equal(layers[0].norms, kept)
    assert layers[0].norms is None
    assert (factored(x) - before).abs().max() > 1e-3
    assert layers[0].norms is None
