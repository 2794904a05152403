"""Dropout's own draws: the right share, the mean, the same elements in the gradient, repeatable, off in evaluation.

Hermetic: random tensors, the tiny model. Alone: pytest tests/contract/test_dropout.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_cli import dropout, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9999])
def test_a_share_p_is_dropped_and_the_mean_kept(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype, requires_grad=True)  # no multiple of four
    made = dropout.QuickDropout(p)(x)
    share = (made == 0).double().mean().item()
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / dropout.STEPS)
    made.backward(torch.full_like(made, 2.0))
    torch.testing.assert_close(x.grad, 2 * made.detach())
    if p < 0.9:
        [large] = made[made != 0].unique().tolist()
        assert large == pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 1e-2)
        assert made.double().mean().item() == pytest.approx(1, abs=2e-2)


def test_draws_are_independent_from_element_to_element() -> None:
    """The four that one random number gives, too: neighbours are dropped together as often as chance has it."""
    torch.manual_seed(0)
    dropped = (dropout.QuickDropout(0.25)(torch.ones(1 << 20)) == 0).double()
    for apart in (1, 2, 3, 4, 5):
        assert (dropped[apart:] * dropped[:-apart]).mean().item() == pytest.approx(0.0625, abs=2e-3)


def test_a_seed_repeats_the_draws_and_evaluation_has_none() -> None:
    layer, x = dropout.QuickDropout(0.3), torch.randn(64, 65)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert layer.eval()(x) is x


def test_every_adapted_module_gets_it(tiny: Path) -> None:
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "model"), config)
    assert dropout.install(adapted) == len(model.lora_layers(adapted)) == 14
    assert not any(type(module) is nn.Dropout for module in adapted.modules())
    ids = torch.arange(30)[None]
    for parameter in adapted.parameters():
        parameter.data += 0.01
    assert (adapted.train()(ids).logits - adapted(ids).logits).abs().max() > 1e-4
    assert torch.equal(adapted.eval()(ids).logits, adapted(ids).logits)
