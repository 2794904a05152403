"""RMS norms in fewer passes: the outputs of the families' own, bit for bit, and their gradients.

Hermetic: random models. Alone: pytest tests/speed/test_rms_norm.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_cli.speed import rms_norm

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NORMS = {
    "llama": 5,
    "qwen3": 9,
    "mistral": 5,
    "granite": 5,
    "phi3": 5,
    "gemma2": 0,
    "gemma3_text": 0,
}
"""Of two layers. Gemma multiplies by 1 + w, in float32."""


def llama(dtype: torch.dtype, width: int = 96) -> nn.Module:
    """Llama's norm with a weight that is not 1 and not trained."""
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype).requires_grad_(requires_grad=False)
    norm.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return norm


def run(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradient of a sum of it with random weights."""
    x = x.detach().requires_grad_()
    made = norm(x)
    (
        made.float() * torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    ).sum().backward()
    return made.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_llama_s_and_the_gradient_no_farther_from_the_exact_one(
    dtype: torch.dtype,
) -> None:
    stock = llama(dtype)
    ours, exact = copy.deepcopy(stock), copy.deepcopy(stock).float()
    assert rms_norm.install(ours) == 1
    x = (3 * torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(2))).to(dtype)
    (theirs, by_theirs), (given, by_ours), (_, wanted) = (
        run(each, x.to(each.weight.dtype)) for each in (stock, ours, exact)
    )
    assert torch.equal(given, theirs)
    assert by_ours.dtype == by_theirs.dtype == dtype
    far = [float((each.float() - wanted).norm() / wanted.norm()) for each in (by_ours, by_theirs)]
    assert far[0] <= 1.25 * far[1] + 1e-6, far
    assert far[0] < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_gradient_is_that_of_the_formula() -> None:
    norm = llama(torch.float32, 8)
    rms_norm.install(norm)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    _, found = run(norm, x)
    step, rows = 1e-2, torch.eye(24).view(24, 3, 8)
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    slopes = [
        float(
            (_reference(norm, x + step * row) - _reference(norm, x - step * row)).mul(weights).sum()
            / (2 * step)
        )
        for row in rows
    ]
    torch.testing.assert_close(found.flatten().tolist(), slopes, rtol=1e-3, atol=1e-3)


def _reference(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("family", NORMS)
def test_families_whose_norm_is_another_keep_it(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SHAPE, vocab_size=300, num_key_value_heads=2, pad_token_id=0
    )
    stock = (
        AutoModelForCausalLM.from_config(config)
        .bfloat16()
        .requires_grad_(requires_grad=False)
        .eval()
    )
    ours = copy.deepcopy(stock)
    assert rms_norm.install(ours) == NORMS[family]
    ids = torch.arange(20)[None]
    assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)
    state = ours.state_dict()
    assert state.keys() == stock.state_dict().keys()
    again = copy.deepcopy(ours)  # and a copy computes with its own weights
    for norm in (module for module in again.modules() if "RMSNorm" in type(module).__name__):
        norm.weight.data.zero_()
    assert torch.equal(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
    if NORMS[family]:
        assert not again(input_ids=ids).logits.any()


def test_norms_that_are_trained_or_are_not_only_a_weight_are_left() -> None:
    assert rms_norm.install(llama(torch.float32).requires_grad_()) == 0
    assert rms_norm.install(nn.LayerNorm(8).requires_grad_(requires_grad=False)) == 0
    before = torch.get_rng_state()
    assert rms_norm.install(llama(torch.float32)) == 1
    assert torch.equal(torch.get_rng_state(), before)
