"""Find out by trying whether a token's logits depend on later tokens, as an encoder's do.

An encoder such as BERT loads as a causal model, and trains: each token sees the one that it is to
foretell, so that the loss falls and nothing is learnt.
"""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.common import LoraError
from lora_cli.models import empty
from lora_cli.models.config import num_experts
from lora_cli.recipe import Task

LENGTH, CHANGED = 16, 12
"""Tokens that are tried, and the place of the one that is changed."""
LEAK = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""How far earlier logits may move, as a share of how far later ones do. Measured in float32 on tiny
models of 150 architectures: at most 2e-6 in causal ones (of experts; 0 in others), at least 7e-4 in
encoders."""
LEAK_WITH_EXPERTS = 5e-2
"""The same in 16 bits, where experts multiply the tokens they get together, in another order."""
MOST_TRIED = 2**28
"""Parameters of a layer with embeddings that is made at random to be tried: a gibibyte."""
ENCODER = (
    "an encoder, in which each token sees the next ones: trained to foretell them, it would learn "
    "nothing"
)


def refuse_encoder(network: PreTrainedModel, name: str) -> None:
    """Raise LoraError where a later token moves the logits of earlier ones, in a loaded model, or
    where it does not run on a text alone."""
    try:
        sees = _sees_later_tokens(network)
    except (TypeError, ValueError) as error:  # it asks for pictures, or for a second text
        said = " ".join(str(error).split())
        raise LoraError(
            f"{name} does not run on a text alone: {said}", "give a causal language model"
        ) from error
    if sees:
        _refuse(network.config, name)


def refuse_encoder_by_config(config: PretrainedConfig, task: Task, name: str) -> None:
    """Raise LoraError for the families of encoders, before weights are loaded: those that are told
    by `is_decoder` in config.json what to be. One layer of such a model is tried, at random."""
    if getattr(config.get_text_config(), "is_decoder", None) is not False:
        return
    layer = copy.deepcopy(config)
    layer.get_text_config().num_hidden_layers = 1
    if empty.build_empty(layer, task).num_parameters() > MOST_TRIED:
        return
    if _sees_later_tokens(empty.build_random(layer, task)):
        _refuse(config, name)


def _refuse(config: PretrainedConfig, name: str) -> None:
    told = hasattr(config, "is_decoder")
    hint = '"is_decoder": true in its config.json makes it a causal model' if told else ""
    raise LoraError(f"{name} is {ENCODER}", hint or "give a causal language model")


@torch.no_grad()
def _sees_later_tokens(network: PreTrainedModel) -> bool:
    size = min(network.config.get_text_config().vocab_size, 1000)
    ids = (torch.arange(LENGTH, device=network.device) * 37 % size)[None]
    other = ids.clone()
    other[0, CHANGED] = (other[0, CHANGED] + size // 2) % size
    training = network.training
    network.eval()
    first, second = (
        network(input_ids=each, use_cache=False).logits.float() for each in (ids, other)
    )
    network.train(training)
    moved = (first - second)[0].abs().amax(-1)
    leak = LEAK.get(network.dtype, LEAK[torch.bfloat16])
    if network.dtype != torch.float32 and num_experts(network.config):
        leak = LEAK_WITH_EXPERTS
    return bool(moved[:CHANGED].max() > leak * moved[CHANGED:].max())
