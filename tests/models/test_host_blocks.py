"""Blocks of a base that wait on the host, and visit a device as they compute.

Another type of numbers stands for the GPU: torch refuses to compute with tensors of both. Hermetic.
Alone: pytest tests/models/test_host_blocks.py; bytes on CUDA: tests/gpu/test_sharded_loading.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_cli.models import host_blocks
from lora_cli.recipe import load

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
         "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
IDS = torch.arange(8)[None]
GPU: Any = torch.float64


def make_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes)).eval()


def find_places(network: PreTrainedModel) -> dict[str, tuple[torch.dtype, int]]:
    return {name: (each.dtype, each.data_ptr()) for name, each in network.named_parameters()}


@torch.no_grad()
def test_a_block_visits_the_device_and_what_is_outside_stays_there() -> None:
    network, there = make_llama(), make_llama().to(GPU)
    before, seen = find_places(network), list[list[int]]()
    host_blocks.keep(network, GPU)
    waiting = find_places(network)
    inside = {name for name in before if ".layers." in name}
    assert {name for name in before if waiting[name] == before[name]} == inside
    assert {waiting[name][0] for name in before if name not in inside} == {GPU}
    assert network.dtype == GPU  # of the first, as its device: all that looks at it chooses by that

    def note(*_: Any) -> None:
        kinds = [layer.mlp.up_proj.weight.dtype for layer in network.model.layers]
        seen.append([number for number, kind in enumerate(kinds) if kind == GPU])

    for layer in network.model.layers:
        layer.mlp.register_forward_hook(note)
    found, wanted = (each(input_ids=IDS, use_cache=False).logits for each in (network, there))
    assert torch.equal(found, wanted)
    assert seen == [[0], [1], [2]]  # one at a time
    assert find_places(network) == waiting
    host_blocks.release(network)
    with pytest.raises(RuntimeError, match="same dtype"):
        network(input_ids=IDS, use_cache=False)


@torch.no_grad()
def test_a_block_that_fails_goes_home() -> None:
    network = make_llama()
    host_blocks.keep(network, GPU)
    waiting = find_places(network)
    with pytest.raises(TypeError):  # as of a base that packing does not suit
        network.model.layers[1](torch.zeros(1, 8, 16, dtype=GPU), position_embeddings=None)
    assert find_places(network) == waiting


@torch.no_grad()
def test_on_the_host_itself_nothing_changes() -> None:
    network = make_llama(tie_word_embeddings=True)
    before, expected = find_places(network), network(input_ids=IDS).logits
    host_blocks.keep(network, torch.device("cpu"))
    assert torch.equal(network(input_ids=IDS).logits, expected)
    host_blocks.release(network)
    assert find_places(network) == before
    assert not any(layer._forward_hooks for layer in network.model.layers)


@pytest.mark.parametrize(
    ("settings", "suits"),
    [
        ("method: lora", True),
        ("method: dora\nlora: {init_lora_weights: gaussian}", True),
        ("method: qlora", False),
        ("lora: {init_lora_weights: pissa_niter_4}", False),
        ("lora: {init_lora_weights: eva}", False),
    ],
)
def test_which_recipes_let_blocks_wait(settings: str, suits: bool, write_recipe) -> None:
    recipe = load.load_recipe(write_recipe(settings + "\n"))
    assert host_blocks.suit(recipe, make_llama()) is suits


def test_which_models_let_blocks_wait(write_recipe) -> None:
    recipe = load.load_recipe(write_recipe())
    encoder = BertForSequenceClassification(BertConfig(**SMALL))
    assert host_blocks.suit(recipe, encoder)
    quantised = make_llama()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert not host_blocks.suit(recipe, quantised)
    whole = make_llama()
    whole._no_split_modules = None
    assert not host_blocks.suit(recipe, whole)
    first = make_llama()  # a block comes first, and with it where the model is
    first.model = torch.nn.Sequential(first.model.layers, first.model.embed_tokens)
    assert not host_blocks.suit(recipe, first)
    assert host_blocks.measure_outside(first) == 2 * 32 * 16 * 4
