"""Models without weights, for their modules' names and shapes."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_cli.common import library_errors, remote_code
from lora_cli.models import config
from lora_cli.models.config import BROKEN_CONFIG

UNBUILDABLE = "transformers cannot build the model that its config.json describes"


def build_empty(name: str, revision: str | None) -> PreTrainedModel:
    """The base without weights (on the `meta` device): its modules' names and shapes, in an instant."""
    return build_from_config(config.load_config(name, revision))


def build_from_config(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without weights."""
    with (
        torch.device("meta"),
        library_errors.translate_file_errors(UNBUILDABLE, BROKEN_CONFIG),
    ):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code.is_allowed())


def build_zero(name: str, revision: str | None) -> PreTrainedModel:
    """The base with float32 zeros for weights, each tensor one number in memory: a place for adapters to be read on."""
    network = build_empty(name, revision)
    for module in network.modules():
        for key, weight in module.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return network
