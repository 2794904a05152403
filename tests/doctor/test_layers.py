"""PEFT's layers against the reference's, in float64: outputs, gradients, merged and unmerged
weights, adapter files.

Hermetic: a few dozen numbers, CPU. Alone: pytest tests/doctor/test_layers.py. As a table: lora
doctor --oracle
"""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_cli.doctor import oracle
from lora_cli.doctor.reference import layers


@pytest.mark.parametrize("lora_dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", oracle.BIASES)
@pytest.mark.parametrize("method", oracle.METHODS)
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_peft_is_the_reference(kind: str, method: str, bias: str, lora_dropout: float) -> None:
    found = oracle.compare_layers(kind, method, bias, lora_dropout)
    assert found.keys() == {"forward", "gradients", "merged", "unmerged", "exchange"}
    assert all(value <= oracle.EXACT for value in found.values()), found


def unscaled(self, adapter):
    return self.lora_B[adapter].weight @ self.lora_A[adapter].weight


def forgetful(self):
    self.merged_adapters.clear()


@pytest.mark.parametrize(
    ("method", "wrong", "measures"),
    [("get_delta_weight", unscaled, {"merged"}), ("unmerge", forgetful, {"unmerged", "merged"})],
)
def test_a_wrong_library_is_noticed(
    monkeypatch: pytest.MonkeyPatch, method: str, wrong, measures: set[str]
) -> None:
    monkeypatch.setattr(f"peft.tuners.lora.layer.Linear.{method}", wrong)
    found = oracle.compare_layers("Linear", "LoRA")
    assert {measure for measure, value in found.items() if not value <= oracle.EXACT} == measures


def test_a_wrong_scaling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracle.LoraModel.save_adapter

    def without_rslora(self, folder):
        self.settings.pop("use_rslora", None)
        right(self, folder)

    monkeypatch.setattr(oracle.LoraModel, "save_adapter", without_rslora)
    found = oracle.compare_layers("Linear", "rsLoRA")
    assert min(found["forward"], found["gradients"]) > 0.01


@pytest.mark.parametrize("method", oracle.METHODS)
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_number_of_parameters_is_the_formulas(kind: str, method: str) -> None:
    base, _ = oracle.make_network(kind, torch.float64, "cpu")
    adapted = oracle.LoraModel(
        base, ["target"], r=oracle.R, lora_alpha=oracle.ALPHA, **oracle.METHODS[method]
    )
    inputs, outputs = {"Linear": (9, 6), "Embedding": (13, 6), "Conv2d": (3 * 3 * 2, 6)}[kind]
    expected = oracle.R * (inputs + outputs) + (outputs if method == "DoRA" else 0)
    assert (
        sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad) == expected
    )


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_initial_values_are_drawn_as_peft_draws_them(init: str) -> None:
    base = nn.Linear(400, 300)
    torch.manual_seed(0)
    ours = layers.LoRALinear(base, r=8, lora_alpha=8, init=init)
    config = LoraConfig(
        r=8, target_modules=["0"], init_lora_weights=True if init == "kaiming_uniform" else init
    )
    theirs = get_peft_model(nn.Sequential(nn.Linear(400, 300)), config).get_submodule(
        "base_model.model.0"
    )
    drawn = theirs.lora_A["default"].weight
    assert not ours.lora_B.any()
    assert not theirs.lora_B["default"].weight.any()
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = √5
    spread = bound / math.sqrt(3) if init == "kaiming_uniform" else 1 / 8
    for tensor in (ours.lora_A, drawn):
        assert tensor.std().item() == pytest.approx(spread, rel=0.05)
        assert (tensor.abs().max() <= bound).item() == (init == "kaiming_uniform")


def test_bias_all_and_lora_only_train_different_biases() -> None:
    trained = {}
    for bias in oracle.BIASES:
        base, _ = oracle.make_network("Linear", torch.float64, "cpu")
        adapted = oracle.LoraModel(base, ["target"], r=2, lora_alpha=2, bias=bias)
        trained[bias] = {
            name
            for name, tensor in adapted.named_parameters()
            if tensor.requires_grad and "bias" in name
        }
    assert trained == {
        "none": set(),
        "all": {"model.target.base.bias", "model.other.bias"},
        "lora_only": {"model.target.base.bias"},
    }


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_peft_s_embedding_starts_from_the_other_side(kind: str) -> None:
    """PEFT and loralib start an Embedding with A zero; step 0 is the base all the same."""
    base, x = oracle.make_network(kind, torch.float64, "cpu")
    before = base(x)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["target"]))
    assert torch.equal(adapted(x), before)
    layer = adapted.get_submodule("base_model.model.target")
    first = (
        layer.lora_embedding_A["default"] if kind == "Embedding" else layer.lora_A["default"].weight
    )
    assert first.any().item() == (kind == "Linear")


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"dilation": 2, "padding": "same"}, {"dilation": 2}]
)
def test_peft_s_conv2d_forgets_dilation_and_padding_mode(options: dict) -> None:
    """Why `targets.py` refuses such convolutions: PEFT builds A without them."""
    base = nn.Sequential(nn.Conv2d(3, 4, 3, **{"padding": 1, **options}))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(1, 3, 8, 8)
    if options == {"dilation": 2}:
        with pytest.raises(RuntimeError, match="must match"):
            adapted(x)
    else:
        unmerged = adapted(x)
        assert not torch.allclose(adapted.merge_and_unload()(x), unmerged, atol=1e-3)


def test_a_gradient_that_is_no_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracle.measure_deviation
    seen: list[float] = []

    def third_is_nan(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        seen.append(right(ours, theirs))
        return float("nan") if len(seen) == 3 else seen[-1]

    monkeypatch.setattr(oracle, "measure_deviation", third_is_nan)
    found = oracle.compare_layers("Linear", "DoRA")
    assert math.isnan(found["gradients"])
    assert math.isnan(oracle.find_largest([0.0, float("nan"), 1.0]))
    assert right(torch.zeros(2), torch.tensor([0.0, float("nan")])) != 0
