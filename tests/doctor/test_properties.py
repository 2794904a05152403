"""What the papers state of their formulas, as properties of the reference, for any shape, input and
seed.

Hermetic: hypothesis, CPU, float64. Alone: pytest tests/doctor/test_properties.py
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.doctor.reference import layers

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**20)
kinds = st.sampled_from(["Linear", "Embedding", "Conv2d"])
LORA = {"Linear": layers.LoRALinear, "Embedding": layers.LoRAEmbedding, "Conv2d": layers.LoRAConv2d}
DORA = {"Linear": layers.DoRALinear, "Embedding": layers.DoRAEmbedding, "Conv2d": layers.DoRAConv2d}
common = settings(max_examples=60, deadline=None)


def base_and_input(kind: str, d_in: int, d_out: int, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A base of random geometry, and an input of random size that fits it."""
    torch.manual_seed(seed)
    if kind == "Linear":
        return nn.Linear(d_in, d_out, dtype=torch.float64), torch.randn(
            3, d_in, dtype=torch.float64
        )
    if kind == "Embedding":
        padding = seed % d_in if seed % 2 else None
        embedding = nn.Embedding(d_in, d_out, padding_idx=padding, dtype=torch.float64)
        nn.init.normal_(
            embedding.weight
        )  # else the padding row is zero: with one row, a column without direction
        return embedding, torch.randint(0, d_in, (2, 5))
    groups, stride, padding, dilation = seed % 3 + 1, seed % 2 + 1, seed % 4, seed // 4 % 2 + 1
    conv = nn.Conv2d(
        d_in * groups, d_out * groups, (3, 2), stride, padding, dilation, groups, bool(seed % 2), dtype=torch.float64
    )  # fmt: skip
    return conv, torch.randn(2, d_in * groups, 9, 7, dtype=torch.float64)


def randomised(layer: layers.LoRALayer) -> layers.LoRALayer:
    for tensor in layer.parameters():
        if tensor.requires_grad:
            tensor.data += 0.5 * torch.randn_like(tensor)
    return layer


@common
@given(kinds, sizes, sizes, st.integers(1, 4), seeds, st.booleans(), st.booleans())
def test_merged_is_unmerged(
    kind: str, d_in: int, d_out: int, r: int, seed: int, dora: bool, use_rslora: bool
) -> None:
    base, x = base_and_input(kind, d_in, d_out, seed)
    r *= getattr(base, "groups", 1)
    layer = randomised(
        (DORA if dora else LORA)[kind](base, r=r, lora_alpha=3, use_rslora=use_rslora)
    )
    original, unmerged = base.weight.clone(), layer(x)
    assert not torch.allclose(unmerged, base(x))
    layer.merge()
    torch.testing.assert_close(base(x), unmerged, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-9, atol=1e-9)
    layer.merge()  # nothing happens twice
    torch.testing.assert_close(base(x), unmerged, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.merged_weight(), base.weight, rtol=1e-9, atol=1e-9)
    layer.lora_A.data += 1  # what is merged comes out again whatever became of A
    layer.unmerge()
    assert torch.equal(base.weight, original)


def test_the_adapter_has_the_base_s_type() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = layers.DoRALinear(nn.Linear(8, 6, dtype=dtype), r=2, lora_alpha=3)
        assert {tensor.dtype for tensor in layer.parameters()} == {dtype}


def test_a_convolution_takes_an_unbatched_input() -> None:
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 8, 8)
    for kind in (layers.LoRAConv2d, layers.DoRAConv2d):
        layer = randomised(kind(copy.deepcopy(conv), r=2, lora_alpha=3))
        torch.testing.assert_close(layer(x), layer(x[None])[0])


@common
@given(kinds, sizes, sizes, seeds, st.booleans(), st.sampled_from(["kaiming_uniform", "gaussian"]))
def test_step_0_is_the_base(
    kind: str, d_in: int, d_out: int, seed: int, dora: bool, init: str
) -> None:
    base, x = base_and_input(kind, d_in, d_out, seed)
    before, weight = base(x), base.weight.clone()
    layer = (DORA if dora else LORA)[kind](base, r=6, lora_alpha=3, init=init)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.merged_weight(), weight, rtol=1e-12, atol=1e-12)
    assert {name for name, tensor in layer.named_parameters() if tensor.requires_grad} == {
        "lora_A", "lora_B", *(["magnitude"] if dora else [])
    }  # fmt: skip


@common
@given(st.sampled_from(["Linear", "Embedding"]), sizes, sizes, st.integers(1, 4), seeds)
def test_the_rank_of_the_update_is_at_most_r(
    kind: str, d_in: int, d_out: int, r: int, seed: int
) -> None:
    layer = randomised(LORA[kind](base_and_input(kind, d_in, d_out, seed)[0], r=r, lora_alpha=3))
    assert torch.linalg.matrix_rank(layer.delta_weight(), rtol=1e-10) <= min(r, d_in, d_out)


@common
@given(kinds, sizes, sizes, seeds)
def test_the_direction_has_unit_norm(kind: str, d_in: int, d_out: int, seed: int) -> None:
    layer = randomised(DORA[kind](base_and_input(kind, d_in, d_out, seed)[0], r=6, lora_alpha=3))
    rows = layer.direction().transpose(0, layer.out_dim).flatten(1)
    torch.testing.assert_close(
        rows.norm(dim=1), torch.ones(len(rows), dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    magnitudes = layer.merged_weight().transpose(0, layer.out_dim).flatten(1).norm(dim=1)
    torch.testing.assert_close(
        magnitudes, layer.magnitude.detach().abs().flatten(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_output_s_variance_over_the_rank(use_rslora: bool) -> None:
    """With independent entries of B, Var(s·BAx) = s²·r·Var(A)·|x|²·Var(B): α²/r times a constant,
    for rsLoRA α²."""
    variance = {}
    for r in (4, 16, 64):
        torch.manual_seed(r)
        draws = []
        for _ in range(30):
            layer = layers.LoRALinear(
                nn.Linear(256, 2048), r=r, lora_alpha=8, use_rslora=use_rslora
            )
            nn.init.normal_(layer.lora_B)
            draws.append(layer.scaling * layer.apply_adapter(torch.randn(8, 256)))
        variance[r] = torch.cat(draws).var().item()
    for r in (16, 64):
        assert variance[r] / variance[4] == pytest.approx(1 if use_rslora else 4 / r, rel=0.1)


@common
@given(sizes, sizes, seeds)
def test_dora_s_gradient_is_orthogonal_in_the_magnitude_only(
    d_in: int, d_out: int, seed: int
) -> None:
    """∂h/∂m is the direction applied to x; with ‖V‖ held constant, ∂h/∂V is m/‖V‖ times x."""
    base, x = base_and_input("Linear", d_in, d_out, seed)
    layer = randomised(layers.DoRALinear(base, r=2, lora_alpha=3))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.magnitude.grad, (x @ layer.direction().T).sum(0).detach())
    through = (layer.magnitude / layer.norm()).detach()
    expected = layer.scaling * (through[:, None] * x.sum(0)) @ layer.lora_A.T
    torch.testing.assert_close(layer.lora_B.grad, expected.detach())


def test_dropout_acts_on_the_adapter_alone() -> None:
    """LoRA: base(x) + s·BA·drop(x); its mean over draws is the output without dropout."""
    base, x = base_and_input("Linear", 8, 6, 1)
    layer = randomised(layers.LoRALinear(base, r=2, lora_alpha=3, lora_dropout=0.5))
    draws = torch.stack([layer(x) for _ in range(4000)])
    mean, spread = draws.mean(0), draws.std(0)
    layer.eval()
    assert ((mean - layer(x)).abs() < 5 * spread / math.sqrt(4000) + 1e-9).all()
    assert spread.min() > 0


def test_what_the_formulas_do_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match="r must be at least 1, not 0"):
        layers.LoRALinear(nn.Linear(2, 2), r=0, lora_alpha=1)
    with pytest.raises(ValueError, match="max_norm"):
        layers.LoRAEmbedding(nn.Embedding(3, 2, max_norm=1.0), r=1, lora_alpha=1)
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        layers.LoRAConv2d(nn.Conv2d(2, 2, 1, groups=2), r=3, lora_alpha=1)
    with pytest.raises(ValueError, match="padding_mode reflect is not covered"):
        layers.LoRAConv2d(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), r=2, lora_alpha=1)
    with pytest.raises(ValueError, match="sparse"):
        layers.LoRAEmbedding(nn.Embedding(3, 2, sparse=True), r=1, lora_alpha=1)
    with pytest.raises(ValueError, match="init must be kaiming_uniform or gaussian, not pissa"):
        layers.LoRALinear(nn.Linear(2, 2), r=1, lora_alpha=1, init="pissa")
    silent = nn.Linear(3, 2)
    silent.weight.data[1] = 0
    with pytest.raises(ValueError, match="all zero, or not finite, has no direction"):
        layers.DoRALinear(copy.deepcopy(silent), r=1, lora_alpha=1)
