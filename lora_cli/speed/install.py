"""Put into a model all that makes its training step quicker and leaves its numbers the same, within
rounding."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.common import LoraError, UsageError
from lora_cli.speed import dora_norms, fused_layer, rms_norm
from lora_cli.speed.cpu import dropout

FUSED = ("cpu", "cuda")
"""Kinds of device on which adapted layers and norms are operations of their own."""


def install(adapted: PeftModel, device: str) -> None:
    """Install what is quicker for a model that trains on `device`, as torch names its kind."""
    dora_norms.install(adapted)
    if device == "cpu":
        dropout.install(adapted)
    if device in FUSED:
        rms_norm.install(adapted)
        fused_layer.install(adapted, device)


def compile_layers(network: nn.Module, options: dict[str, Any]) -> int:
    """Have torch compile the decoder's layers when they are first called; return how many there
    are.

    Each is compiled by itself and in place, so that tensors keep their names and what was compiled
    for one layer serves the others. `options` are torch.compile's. Raise LoraError for a model that
    does not mark its layers, UsageError for options that torch refuses.
    """
    layers = [
        module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        off = "--set training.torch_compile=false"
        raise LoraError("training.torch_compile: this model does not mark its layers", off)
    try:
        for layer in layers:
            layer.compile(**options)
    except RuntimeError as error:  # an unknown backend or mode
        keys = " and ".join(f"training.torch_compile_{name}" for name in options)
        raise UsageError(f"{keys}: {str(error).splitlines()[0]}", "remove it") from error
    return len(layers)
