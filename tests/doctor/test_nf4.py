"""bitsandbytes' NF4 against the reference's: codebooks, codes, scales, values, and QLoRA's
gradients.

Hermetic: CPU. Alone: pytest tests/doctor/test_nf4.py
"""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.doctor import oracle
from lora_cli.doctor.reference import nf4


def test_the_codebooks_are_bitsandbytes_own() -> None:
    assert torch.equal(nf4.nf4_codebook(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_codebook(), functional.create_dynamic_map())


# bitsandbytes misreads rows of other lengths on some processors: see model.misread_row_lengths
ROW_LENGTHS = st.sampled_from([2, 6, 50, 62, 64, 70, 128, 130, 192, 320])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 40),
    columns=ROW_LENGTHS,
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-4, 1, 30]),
)
def test_codes_and_scales_are_equal_byte_for_byte(
    dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = oracle.compare_nf4((scale * torch.randn(rows, columns, generator=generator)).to(dtype))
    assert found.pop("scale codes") <= 1  # few scales: one may be all of them
    assert found == {"codes": 0, "absmax": 0, "values": 0, "values (double)": 0}


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, 8),
        torch.ones(3, 50),
        torch.tensor([[0.0, 1e-30, 0, 1]]),
        torch.full((2, 64), -7.5),
    ],
    ids=str,
)
def test_odd_weights_are_equal_too(weight: torch.Tensor) -> None:
    found = oracle.compare_nf4(weight)
    assert {found[name] for name in ("codes", "absmax", "values", "values (double)")} == {0}


def test_scale_codes_differ_only_where_bitsandbytes_rounds_to_its_grid() -> None:
    """At most 0.5 % of them differ, and hardly any once the values are rounded to the steps its CPU
    kernel looks up."""
    torch.manual_seed(0)
    weight = torch.randn(4096, 4096)
    _, theirs = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=True
    )
    ours = nf4.NF4Tensor(weight)
    assert torch.equal(ours.offset, theirs.offset)
    assert torch.equal(ours.scale_absmax, theirs.state2.absmax)
    assert 0 < oracle.measure_differing(ours.scale_codes, theirs.absmax) <= oracle.SCALE_CODES
    scales = nf4.NF4Tensor(weight, double_quant=False).absmax() - theirs.offset
    scaled = nf4.blocks(scales, nf4.SCALE_BLOCK) / ours.scale_absmax.unsqueeze(1)
    grid = ((scaled + 1) / 2 * 65535).round() / 65535 * 2 - 1
    codebook = nf4.dynamic_codebook()
    rounded = torch.bucketize(grid, (codebook[:-1] + codebook[1:]) / 2).flatten()[: scales.numel()]
    assert oracle.measure_differing(rounded.to(torch.uint8), theirs.absmax) <= 2e-5


def test_double_quantisation_costs_what_it_says() -> None:
    weight = torch.randn(1024, 1024)
    tensor = nf4.NF4Tensor(weight)
    scales = tensor.scale_codes.numel() * 8 + tensor.scale_absmax.numel() * 32
    assert scales / weight.numel() == pytest.approx(0.127, abs=0.001)
    assert tensor.packed.numel() * 2 == weight.numel()
    assert (tensor.dequantize() - weight).abs().max() < 0.6
    assert (tensor.dequantize() - weight).pow(2).mean() < 0.01  # of a variance of 1


def test_qlora_on_bitsandbytes_is_the_reference() -> None:
    found = oracle.compare_qlora()
    assert found.keys() == {"forward", "gradients", "merged"}
    assert all(value <= oracle.SINGLE for value in found.values()), found


def test_wrong_4bit_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without `keep_4bit_weights_unpacked` on a processor with AVX512_BF16; simulated, so that
    it runs anywhere."""
    from bitsandbytes.nn import Linear4bit

    def without_gradient(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return ordinary(self, x)

    ordinary = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", without_gradient)
    found = oracle.compare_qlora()
    assert found["gradients"] > 0.1
    assert found["forward"] <= oracle.SINGLE


def test_qlora_linear_keeps_no_float_weight_until_it_is_merged() -> None:
    plain = nn.Linear(64, 32)
    layer = nf4.QLoRALinear(plain, r=2, lora_alpha=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    unmerged = layer(x)
    assert layer.base.weight.numel() == 0
    layer.merge()
    assert layer.base.weight.shape == (32, 64)
    torch.testing.assert_close(layer(x), unmerged)
    layer.unmerge()
    assert torch.equal(layer(x), unmerged)
    other = nf4.QLoRALinear(nn.Linear(64, 32), r=2, lora_alpha=2)
    other.load_state_dict(layer.state_dict())  # the codes are part of it
    assert torch.equal(other(x), unmerged)
    dropping = nf4.QLoRALinear(nn.Linear(64, 32), r=2, lora_alpha=2, lora_dropout=0.5)
    nn.init.normal_(dropping.lora_B)
    assert not torch.equal(dropping(x), dropping(x))
