"""The reference's module tree is PEFT's: what is adapted, what a file means, swapping, merging.

Hermetic: small networks, CPU, float64. Alone: pytest tests/doctor/test_tree.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.doctor.reference.tree import LoraModel


class Net(nn.Module):
    """Embedding, two blocks of two Linears, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(self.conv(self.norm(x).unsqueeze(1)).permute(0, 2, 1, 3).flatten(2))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


IDS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))


def randomise(adapted: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for tensor in adapted.parameters():
        if tensor.requires_grad:
            tensor.data += 0.3 * torch.randn_like(tensor)


def test_modules_are_chosen_as_peft_chooses_them(net: Net) -> None:
    for targets in (["up"], ["blocks.0.up", "own"], ["embed", "conv", "head"], ["s.1.up", "head"]):
        config = LoraConfig(r=2, target_modules=targets)
        theirs = get_peft_model(copy.deepcopy(net), config).targeted_module_names
        assert set(LoraModel(copy.deepcopy(net), targets, r=2, lora_alpha=4).layers) == set(theirs)
    with pytest.raises(ValueError, match=r"no module matches \['own'\]"):
        LoraModel(net, ["own"], r=2, lora_alpha=4)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_saved_swapped_and_merged_as_peft_does(
    net: Net, tmp_path: Path, use_dora: bool, bias: str
) -> None:
    close = {"rtol": 1e-12, "atol": 1e-12}
    base, before = copy.deepcopy(net), net(IDS)
    options = {"use_dora": use_dora, "bias": bias}
    adapted = LoraModel(net, ["up", "embed", "conv"], r=2, lora_alpha=4, **options)
    randomise(adapted)
    first = adapted(IDS)
    adapted.save_adapter(tmp_path / "first")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "first"))
    torch.testing.assert_close(theirs(IDS), first, **close)

    config = LoraConfig(r=3, lora_alpha=2, target_modules=["down", "embed"], **options)
    second = get_peft_model(copy.deepcopy(base), config)
    randomise(second, 5)
    second.save_pretrained(str(tmp_path / "second"))
    adapted.swap_adapter(tmp_path / "second")
    torch.testing.assert_close(adapted(IDS), second(IDS), **close)
    adapted.swap_adapter(tmp_path / "first")
    assert torch.equal(adapted(IDS), first)
    assert not torch.allclose(first, before)

    merged = copy.deepcopy(adapted).merge().state_dict()
    base.load_state_dict(merged)  # a plain network, and not one tensor more
    torch.testing.assert_close(base(IDS), first, **close)
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, **close)
    assert torch.equal(adapted.remove_adapter()(IDS), before)


def test_a_file_that_lacks_tensors_is_refused(net: Net, tmp_path: Path) -> None:
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    adapted.save_adapter(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, tmp_path / "ours" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="are not those its configuration describes"):
        adapted.swap_adapter(tmp_path / "ours")
