"""Adapted layers as one operation: PEFT's outputs and gradients, for linear and 4-bit ones, LoRA
and DoRA, dropout.

Hermetic: random layers and the tiny model. Alone: pytest tests/speed/test_fused_layer.py
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from lora_cli.models import attach
from lora_cli.models.base import Base
from lora_cli.speed import dora_norms, fused_layer, install
from lora_cli.speed.cpu import dropout
from tests.networks import IN, Layers, random_model

TARGETS = ["first", "second", "third"]


def pair(network: torch.nn.Module, device: str = "cpu", **options) -> tuple[PeftModel, PeftModel]:
    """The network with PEFT's adapters, far from where they start, and a copy of it with each layer
    one operation, as on a device of that kind.

    Both drop out what `dropout` draws.
    """
    torch.manual_seed(0)
    stock = get_peft_model(
        network, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **options})
    )
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            size = parameter.abs() if "magnitude" in name else 1
            parameter.data += 0.1 * size * torch.randn_like(parameter)
    dropout.install(stock)
    ours = copy.deepcopy(stock)
    dora_norms.install(ours)
    assert fused_layer.install(ours, device) == len(attach.find_lora_layers(stock))
    return stock, ours


def run(network: PeftModel, dtype: torch.dtype, half: bool) -> list[torch.Tensor]:
    """Output and every gradient, the input's too."""
    torch.manual_seed(1)
    x = torch.randn(3, 40, IN).bfloat16().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = network.train()(x)
    torch.manual_seed(2)
    (out.float() * torch.randn(out.shape)).sum().backward()
    return [
        out.detach(),
        x.grad,
        *(p.grad.clone() for p in network.parameters() if p.requires_grad),
    ]


@pytest.mark.parametrize("method", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"bias": "all"}], ids=str
)
def test_outputs_and_gradients_are_peft_s(options: dict, method: dict) -> None:
    stock, ours = pair(Layers(), **options, **method)
    wanted, given = (run(network, torch.float32, half=False) for network in (stock, ours))
    assert len(wanted) == 2 + (9 if method else 6) + (2 if "bias" in options else 0)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    with stock.disable_adapter():
        assert (run(stock, torch.float32, half=False)[0] - wanted[0]).abs().max() > 0.1


def mask_of_positions(x: torch.Tensor, p: float, one_pass: bool) -> torch.Tensor | None:
    """What other devices draw, drawn as on a CPU, so that it can be compared."""
    if not p:
        return None
    mask = torch.zeros(x.numel() + 1, dtype=torch.bool)
    mask[dropout.draw_positions(x.numel(), p)] = True
    return mask[:-1]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_the_way_of_other_devices_is_the_same(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = pair(Layers(), "cuda", **options)
    wanted = run(stock, torch.float32, half=False)
    monkeypatch.setattr(fused_layer, "SUMMED", 1000)  # several, and a last one that is not full
    monkeypatch.setattr(fused_layer.columns, "scale_columns", None)
    monkeypatch.setattr(fused_layer, "_draw_dropped", mask_of_positions)
    for one, other in zip(run(ours, torch.float32, half=False), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_nothing_of_another_device_is_mixed_in(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` refuses tensors of a CPU, as a GPU does; unlike one it knows no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    _, ours = pair(Layers(), "cuda", **options)
    ours.to("meta")
    x = torch.randn(3, IN, device="meta", requires_grad=True)
    out = ours.train()(x)
    out.sum().backward()
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert {tensor.device.type for tensor in (out, x.grad, *(p.grad for p in trained))} == {"meta"}
    assert len(trained) >= 6


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_they_are_no_farther_from_float32_than_peft_s(
    dtype: torch.dtype, options: dict
) -> None:
    network = Layers()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    stock, ours = pair(network, **options)
    exact = run(stock, torch.float32, half=False)
    found = []
    for each in (stock, ours):
        for layer in attach.find_lora_layers(each).values():
            layer.get_base_layer().to(dtype)
        each.zero_grad()
        found.append(run(each, dtype, half=True))
    far = [
        [float((a.float() - b).norm() / b.norm()) for a, b in zip(each, exact, strict=True)]
        for each in found
    ]
    assert 1e-3 < sum(far[1]) < 1.25 * sum(far[0]) < 1, far
    assert all(one.dtype == other.dtype for one, other in zip(*found, strict=True))


def test_small_changes_of_a_magnitude_are_not_lost_to_16_bits() -> None:
    """A change of a thousandth, which is nothing beside 1 in bfloat16, moves the outputs by as much
    as with PEFT."""
    moved = []
    for network in pair(Layers().to(torch.bfloat16), use_dora=True):
        before = run(network, torch.bfloat16, half=True)[0].double()
        for layer in attach.find_lora_layers(network).values():
            layer.lora_magnitude_vector["default"].weight.data *= 1.001
        after = run(network, torch.bfloat16, half=True)[0].double()
        moved.append(((after * before).sum() / before.square().sum() - 1).item())
    assert moved[1] == pytest.approx(moved[0], rel=0.2)
    assert moved[0] > 1e-4


def test_what_is_more_than_plain_lora_is_peft_s() -> None:
    stock, ours = pair(Layers(), target_modules=["first", "second"])
    for network in (stock, ours):
        torch.manual_seed(3)
        network.add_adapter(
            "other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
        )
        network.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, IN)
    torch.testing.assert_close(ours(x), stock(x))
    alone = ours(x)
    ours.set_adapter("other")
    assert (ours(x) - alone).abs().max() > 0.1
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_on_4_bit_layers_too(tiny: Path, options: dict) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = Base(str(tiny / "model")).load(torch.float32, nf4)
    stock, ours = pair(base, **{"target_modules": "all-linear", **options})
    assert sum(type(layer) is fused_layer.Fused4bit for layer in ours.modules()) == 14
    ids = torch.arange(8, 40)[None]
    for network in (stock, ours):
        torch.manual_seed(0)
        network.train()(input_ids=ids, labels=ids).loss.backward()
    pairs = list(zip(attach.walk_trainable(ours), attach.walk_trainable(stock), strict=True))
    assert len(pairs) == (42 if "use_dora" in options else 28)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-4, atol=1e-4 * other.grad.abs().max().item(), msg=name
        )


def test_what_it_does_not_know_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"lora_bias": True}, {"use_dora": True, "lora_dropout": 0.3}):
        network = get_peft_model(Layers(), LoraConfig(target_modules=["first"], **options))
        dora_norms.install(network)
        installed = fused_layer.install(network, "cpu")
        assert installed == (0 if "lora_bias" in options else 1)
        monkeypatch.setattr(fused_layer._Adapted, "apply", None)
        network.train()(torch.randn(3, IN)).sum().backward()
        monkeypatch.undo()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "family",
    [
        {"family": "olmo", "clip_qkv": 0.01},
        {"family": "olmo", "clip_qkv": 0.01, "attention_bias": True},
        {"family": "falcon"},
    ],
    ids=["olmo", "olmo with biases", "falcon"],
)
def test_models_that_change_their_projections_in_place_train_too(
    family: dict, options: dict
) -> None:
    base = random_model(**family)
    stock = get_peft_model(base, LoraConfig(target_modules="all-linear", **options))
    ours = copy.deepcopy(stock)
    install.install(ours, "cpu")
    ids = torch.arange(8, 40)[None]
    for network in (stock, ours):
        network.train()(input_ids=ids, labels=ids).loss.backward()
    for (name, one), (_, other) in zip(
        attach.walk_trainable(ours), attach.walk_trainable(stock), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
