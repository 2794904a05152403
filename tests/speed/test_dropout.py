"""Dropout's own draws: the right share, the mean, the same elements in the gradient, repeatable,
off in evaluation.

Hermetic: random tensors, the tiny model. Alone: pytest tests/speed/test_dropout.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_cli.models import attach
from lora_cli.speed.cpu import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9999])
def test_a_share_p_is_dropped_and_the_mean_kept(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype, requires_grad=True)
    made = dropout.QuickDropout(p)(x)
    share = (made == 0).double().mean().item()
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    made.backward(torch.full_like(made, 2.0))
    torch.testing.assert_close(x.grad, 2 * made.detach())
    if p < 0.9:
        [large] = made[made != 0].unique().tolist()
        assert large == pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 1e-2)
        assert made.double().mean().item() == pytest.approx(1, abs=2e-2)


def test_draws_are_independent_from_element_to_element() -> None:
    """Neighbours are dropped together as often as chance has it, and the first and the last as
    often as any."""
    torch.manual_seed(0)
    dropped = (dropout.QuickDropout(0.25)(torch.ones(1 << 20)) == 0).double()
    for apart in (1, 2, 3, 4, 5):
        assert (dropped[apart:] * dropped[:-apart]).mean().item() == pytest.approx(0.0625, abs=2e-3)
    few = torch.stack(
        [dropout.QuickDropout(0.25)(torch.ones(7)) == 0 for _ in range(20_000)]
    ).double()
    assert few.mean(0).tolist() == pytest.approx([0.25] * 7, abs=4 * (0.25 * 0.75 / 20_000) ** 0.5)


def test_a_seed_repeats_the_draws_and_evaluation_has_none() -> None:
    layer, x = dropout.QuickDropout(0.3), torch.randn(64, 65)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert layer.eval()(x) is x


def test_positions_are_in_order_and_as_many_whatever_they_are() -> None:
    torch.manual_seed(0)
    draws = [dropout.draw_positions(1000, 0.1) for _ in range(50)]
    assert len({len(draw) for draw in draws}) == 1
    for draw in draws:
        inside = draw[draw < 1000]
        assert 0 <= inside[0] <= inside[-1] < 1000 == draw[-1] == draw.max()
        assert (inside.diff() > 0).all()


def test_every_adapted_module_gets_it(tiny: Path) -> None:
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "model"), config)
    assert dropout.install(adapted) == len(attach.find_lora_layers(adapted)) == 14
    assert not any(type(module) is nn.Dropout for module in adapted.modules())
    ids = torch.arange(30)[None]
    for parameter in adapted.parameters():
        parameter.data += 0.01
    assert (adapted.train()(ids).logits - adapted(ids).logits).abs().max() > 1e-4
    assert torch.equal(adapted.eval()(ids).logits, adapted(ids).logits)
