"""Build models without weights, for their modules' names and shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import init_empty_weights
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from lora_cli.common import library_errors, remote_code
from lora_cli.models import ties
from lora_cli.models.config import BROKEN_CONFIG
from lora_cli.recipe import Task


def _explain_unbuildable(config: PretrainedConfig) -> AbstractContextManager[None]:
    owner = (
        f"the config.json of {config.name_or_path}" if config.name_or_path else "its config.json"
    )
    what = f"transformers cannot build the model that {owner} describes"
    return library_errors.translate_file_errors(what, BROKEN_CONFIG)


def build_empty(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """Build the model of a configuration without weights (on the `meta` device)."""
    with torch.device("meta"), _explain_unbuildable(config):
        return task.find_auto_class(config).from_config(
            copy.deepcopy(config), trust_remote_code=remote_code.is_allowed()
        )


def build_zero(config: PretrainedConfig, task: Task, parted: Iterable[str] = ()) -> PreTrainedModel:
    """Build it with float32 zeros for weights, each tensor one number in memory: a place for
    adapters to be read on. `parted` parameters are not tied to others."""
    network = build_empty(config, task)
    ties.part(network, parted)
    for module in network.modules():
        for key, weight in module.named_parameters(recurse=False):
            setattr(
                module,
                key,
                torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False),
            )
    return network


def build_random(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """Build it in float32 with random weights, without a trace in torch's random numbers."""
    with (
        torch.random.fork_rng(devices=[]),
        _explain_unbuildable(config),
    ):
        return task.find_auto_class(config).from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=remote_code.is_allowed()
        )


def build_unweighted(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """Build it in float32 without its parameters; buffers that are computed, such as rotary
    frequencies, are real."""
    with (
        init_empty_weights(include_buffers=False),
        _explain_unbuildable(config),
    ):
        network = task.find_auto_class(config).from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=remote_code.is_allowed()
        )
    network.tie_weights()  # taking the weights away has parted them
    return network
