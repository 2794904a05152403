"""LoRA in one product: PEFT's outputs and gradients, for linear and 4-bit layers, with dropout and without.

Hermetic: random layers and the tiny model. Alone: pytest tests/contract/test_fused.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lora_cli import fused, model

IN, OUT = 96, 160


class Layers(torch.nn.Module):
    """A linear layer with bias, one without, one the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(IN, OUT), torch.nn.Linear(OUT, IN, bias=False)
        self.third = Conv1D(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


def pair(network: torch.nn.Module, **options) -> tuple[PeftModel, PeftModel]:
    """The network with PEFT's LoRA, B ≠ 0, and a copy of it in one product."""
    torch.manual_seed(0)
    stock = get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 16, **options}))
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ours = copy.deepcopy(stock)
    assert fused.install(ours) == len(model.lora_layers(stock))
    return stock, ours


def run(network: PeftModel, dtype: torch.dtype, half: bool) -> list[torch.Tensor]:
    """Output and every gradient, the input's too."""
    torch.manual_seed(1)
    x = torch.randn(3, 7, IN).bfloat16().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = network.train()(x)
    torch.manual_seed(2)
    (out.float() * torch.randn(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in network.parameters() if p.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"bias": "all"}], ids=str)
def test_outputs_and_gradients_are_peft_s(options: dict) -> None:
    stock, ours = pair(Layers(), target_modules=["first", "second", "third"], **options)
    wanted, given = (run(network, torch.float32, half=False) for network in (stock, ours))
    assert len(wanted) == 2 + 6 + (2 if "bias" in options else 0)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    with stock.disable_adapter():
        assert (run(stock, torch.float32, half=False)[0] - wanted[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_they_are_no_farther_from_float32_than_peft_s(dtype: torch.dtype) -> None:
    network = Layers()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    stock, ours = pair(network, target_modules=["first", "second", "third"])
    exact = run(stock, torch.float32, half=False)
    found = []
    for each in (stock, ours):
        for layer in model.lora_layers(each).values():
            layer.get_base_layer().to(dtype)
        each.zero_grad()
        found.append(run(each, dtype, half=True))
    far = [[float((a.float() - b).norm() / b.norm()) for a, b in zip(each, exact, strict=True)] for each in found]
    assert 1e-3 < sum(far[1]) < 1.1 * sum(far[0]) < 1, far
    assert all(one.dtype == other.dtype for one, other in zip(*found, strict=True))


def test_base_and_adapter_are_one_operation_where_nothing_is_dropped_or_trained() -> None:
    options = {"target_modules": ["first", "second", "third"]}

    def fused_layers(**more) -> list[str]:
        _, ours = pair(Layers(), **options, **more)
        return [name for name, layer in model.lora_layers(ours).items() if type(layer) is fused.FusedLinear]

    assert fused_layers() == ["base_model.model.first", "base_model.model.second"]
    assert fused_layers(lora_dropout=0.3) == []
    assert fused_layers(bias="all") == ["base_model.model.second"]


def test_what_is_more_than_plain_lora_is_peft_s() -> None:
    stock, ours = pair(Layers(), target_modules=["first", "second"])
    for network in (stock, ours):
        torch.manual_seed(3)
        network.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        network.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, IN)
    torch.testing.assert_close(ours(x), stock(x))
    alone = ours(x)
    ours.set_adapter("other")
    assert (ours(x) - alone).abs().max() > 0.1
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(x), stock(x))


def test_on_4_bit_layers_too(tiny: Path) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock, ours = pair(model.load_base(str(tiny / "model"), None, torch.float32, nf4), target_modules="all-linear")
    assert sum(type(layer) is fused.Fused4bit for layer in ours.modules()) == 14
    ids = torch.arange(8, 40)[None]
    for network in (stock, ours):
        network.train()(input_ids=ids, labels=ids).loss.backward()
    pairs = list(zip(model.trainable(ours), model.trainable(stock), strict=True))
    assert len(pairs) == 28
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4 * other.grad.abs().max().item(), msg=name)


def test_dora_embeddings_and_lora_bias_are_left_to_peft() -> None:
    network = get_peft_model(Layers(), LoraConfig(target_modules=["first"], lora_bias=True))
    assert fused.install(network) == 0
    network = get_peft_model(Layers(), LoraConfig(target_modules=["first"], use_dora=True))
    assert fused.install(network) == 0
