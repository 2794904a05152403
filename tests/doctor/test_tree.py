"""The reference's whole-tree operations: what is adapted, swapping adapters on one base, files that
others open.

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

from lora_cli.doctor.reference.layers import LoRALayer
from lora_cli.doctor.reference.tree import LoraModel, matches


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


def adapted_modules(adapted: LoraModel) -> set[str]:
    return {name for name, module in adapted.model.named_modules() if isinstance(module, LoRALayer)}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["up"], (), {"blocks.0.up", "blocks.1.up"}),
        (["up", "down"], ["blocks.0.up"], {"blocks.0.down", "blocks.1.up", "blocks.1.down"}),
        (r"blocks\.1\..*|embed", (), {"blocks.1.up", "blocks.1.down", "embed"}),
        (["embed", "conv", "head"], r"h.*", {"embed", "conv"}),
    ],
)
def test_modules_are_chosen_as_peft_chooses_them(
    net: Net, include, exclude, expected: set[str]
) -> None:
    adapted = LoraModel(copy.deepcopy(net), include, exclude, r=2, lora_alpha=4)
    assert adapted_modules(adapted) == expected
    config = LoraConfig(r=2, target_modules=include, exclude_modules=exclude or None)
    theirs = get_peft_model(net, config)
    assert set(theirs.targeted_module_names) == expected


def test_what_cannot_be_adapted_is_refused(net: Net) -> None:
    with pytest.raises(ValueError, match=r"no module matches \['nothing'\]"):
        LoraModel(copy.deepcopy(net), ["nothing"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        LoraModel(copy.deepcopy(net), ["norm"], r=2, lora_alpha=4)
    net.blocks[1]["up"].weight = net.blocks[0]["up"].weight
    with pytest.raises(ValueError, match=r"the weight of blocks\.0\.up serves another module too"):
        LoraModel(net, ["up"], r=2, lora_alpha=4)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_adapters_are_swapped_on_one_base(net: Net, bias: str) -> None:
    before = net(IDS)
    adapted = LoraModel(net, ["up", "embed"], r=2, lora_alpha=4, bias=bias)
    randomise(adapted, 1)
    first = adapted(IDS)
    adapted.add("second", ["down", "head", "conv"], use_dora=True, r=3, lora_alpha=4, bias=bias)
    torch.testing.assert_close(
        adapted(IDS), before
    )  # a fresh adapter starts from the base, not from the other's biases
    randomise(adapted, 2)
    second = adapted(IDS)
    for name, expected in (
        ("default", first),
        ("second", second),
        (None, before),
        ("second", second),
        ("default", first),
    ):
        adapted.use(name)
        assert torch.equal(adapted(IDS), expected), name
        assert any(tensor.requires_grad for tensor in adapted.parameters()) == (name is not None)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_files_are_opened_by_others_and_others_files_are_opened(
    net: Net, tmp_path: Path, use_dora: bool, bias: str
) -> None:
    base = copy.deepcopy(net)
    adapted = LoraModel(
        net, ["up", "embed", "conv"], r=2, lora_alpha=4, use_dora=use_dora, bias=bias
    )
    randomise(adapted)
    expected = adapted(IDS)
    adapted.save_adapter(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(IDS), expected, rtol=1e-12, atol=1e-12)

    config = LoraConfig(
        r=3, lora_alpha=2, target_modules=["down", "embed"], use_dora=use_dora, bias=bias
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    randomise(theirs, 5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapted.load_adapter(tmp_path / "theirs", "theirs")
    torch.testing.assert_close(adapted(IDS), theirs(IDS), rtol=1e-12, atol=1e-12)
    adapted.use("default")
    torch.testing.assert_close(adapted(IDS), expected, rtol=1e-12, atol=1e-12)

    adapted.save_merged(tmp_path / "merged.safetensors")
    base.load_state_dict(
        load_file(tmp_path / "merged.safetensors")
    )  # a plain network, and not one tensor more
    torch.testing.assert_close(base(IDS), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(adapted(IDS), expected)  # saving merged nothing here
    plain = adapted.merge()
    torch.testing.assert_close(plain(IDS), expected, rtol=1e-12, atol=1e-12)
    assert {type(module) for module in plain.modules()} == {
        type(module) for module in base.modules()
    }


def test_the_summary_counts(net: Net) -> None:
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    total = sum(tensor.numel() for tensor in adapted.parameters())
    assert (
        adapted.summary()
        == f"trainable: 80 of {total:,} parameters ({80 / total:.2%}) in 2 modules"
    )
    adapted.use(None)
    assert adapted.summary().startswith("trainable: 0 of ")


def test_an_adapter_comes_back_in_the_mode_the_model_is_in(net: Net) -> None:
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4, lora_dropout=0.9).eval()
    adapted.add("second", ["down"], r=2, lora_alpha=4, lora_dropout=0.9)
    randomise(adapted)
    assert torch.equal(adapted(IDS), adapted(IDS))
    adapted.train()
    assert not torch.equal(adapted(IDS), adapted(IDS))


def test_a_merged_layer_is_unmerged_when_its_adapter_goes(net: Net) -> None:
    before = net(IDS)
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    randomise(adapted)
    for layer in adapted.adapters["default"].values():
        layer.merge()
    adapted.use(None)
    assert torch.equal(adapted(IDS), before)


def test_names_match_whole_parts_only() -> None:
    assert matches("block.up", ["up"])
    assert not matches("block.setup", ["up"])
    assert matches("block.up", r".*\.up")
    assert not matches("block.up.more", r".*\.up")


def test_a_saved_name_means_itself_only(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(3, 3)}), "axb": nn.Linear(3, 3)})
    adapted = LoraModel(network, ["a.b"], r=2, lora_alpha=4, lora_dropout=0.25)
    adapted.save_adapter(tmp_path / "ours")
    adapted.load_adapter(tmp_path / "ours", "again")
    assert set(adapted.adapters["again"]) == {"a.b"}
    assert adapted.adapters["again"]["a.b"].dropout.p == 0.25


def test_what_is_not_there_changes_nothing(net: Net) -> None:
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    randomise(adapted)
    expected = adapted(IDS)
    with pytest.raises(KeyError):
        adapted.use("typo")
    with pytest.raises(ValueError, match="no module matches"):
        adapted.add("second", ["nothing"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="is there already"):
        adapted.add("default", ["down"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="bias lora-only is not none, all or lora_only"):
        adapted.add("second", ["down"], r=2, lora_alpha=4, bias="lora-only")
    assert torch.equal(adapted(IDS), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"up": 1}},
        {"alpha_pattern": {"up": 1}},
        {"modules_to_save": ["head"]},
        {"lora_bias": True},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_an_adapter_the_reference_does_not_cover_is_refused(
    net: Net, tmp_path: Path, options: dict
) -> None:
    theirs = get_peft_model(
        copy.deepcopy(net).float(), LoraConfig(r=2, target_modules=["up", "down"], **options)
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    expected = adapted(IDS)
    with pytest.raises(ValueError, match="not covered"):
        adapted.load_adapter(tmp_path / "theirs", "theirs")
    assert (adapted.active, list(adapted.adapters)) == ("default", ["default"])
    assert torch.equal(adapted(IDS), expected)


def test_a_file_that_lacks_tensors_is_refused(net: Net, tmp_path: Path) -> None:
    adapted = LoraModel(net, ["up"], r=2, lora_alpha=4)
    adapted.save_adapter(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, tmp_path / "ours" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="are not those its configuration describes"):
        adapted.load_adapter(tmp_path / "ours", "again")
    assert (adapted.active, list(adapted.adapters)) == ("default", ["default"])


def test_a_tied_model_is_saved_merged(tmp_path: Path) -> None:
    network = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "mid": nn.Linear(3, 3)}
    )
    network["head"].weight = network["embed"].weight
    LoraModel(network, ["mid"], r=2, lora_alpha=4).save_merged(tmp_path / "merged.safetensors")
    assert set(load_file(tmp_path / "merged.safetensors")) == {
        "embed.weight",
        "head.weight",
        "mid.weight",
        "mid.bias",
    }
