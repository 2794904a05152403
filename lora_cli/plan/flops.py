"""Count the floating-point operations of training on one token, or one picture, and the share of a
device's peak.

A frozen weight takes 2 for the forward pass and 2 for the gradient of its input: 4N for the base,
not the 6N of full training. A trained one takes 2 more for its own gradient. What checkpointing
computes again is not counted, as it does not get the run further. Attention is counted as causal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import get_peak_flops

from lora_cli.models import find_task_of, num_active_experts, num_experts, read_field

FROZEN = 4
TRAINED = 6
"""Operations that a weight takes for each token it works on."""


class Work(NamedTuple):
    """Operations for one token, or picture, and the device's peak in operations per second where
    known."""

    each: float
    peak: float | None
    unit: str = "tokens"
    """What is counted."""

    def used(self, tokens_per_second: float) -> float | None:
        """Return the share of the device's peak that a speed reaches (MFU); None for an unknown
        peak."""
        return self.each * tokens_per_second / self.peak if self.peak else None


def count_per_token(adapted: PeftModel, context: float, labelled: float = 1.0) -> float:
    """Operations for one token whose document has `context` tokens on average.

    `labelled` is the share of tokens for which logits are made; of pairs, that of the targets.
    """
    config: Any = adapted.get_base_model().config.get_text_config()
    head = adapted.get_output_embeddings()
    inside = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    total = 0.0
    seen: set[int] = set()
    sides = _share_sides(adapted, labelled)
    for module in adapted.modules():
        for parameter in module.parameters(recurse=False):
            # an embedding looks rows up, unless it is the head as well
            looked_up = isinstance(module, nn.Embedding) and id(parameter) not in inside
            weights = _count_weights(parameter)
            if id(parameter) in seen or looked_up or not weights:
                continue
            seen.add(id(parameter))
            share = labelled if id(parameter) in inside else _active_share(parameter, config)
            share *= sides.get(id(parameter), 1.0)
            total += (TRAINED if parameter.requires_grad else FROZEN) * share * weights
    return float(total + 6 * _sum_attention_widths(config) * context)


def _share_sides(adapted: PeftModel, targets: float) -> dict[int, float]:
    """Return for each parameter of an encoder and of the decoder beside it the share of tokens that
    it works on; nothing for other models."""
    network = adapted.get_base_model()
    if not find_task_of(adapted).has_targets:
        return {}
    found: dict[int, float] = {}
    for side, share in ((network.get_encoder(), 1 - targets), (network.get_decoder(), targets)):
        found |= {id(parameter): share for parameter in side.parameters()}
    head = network.get_output_embeddings()
    return found if head is None else found | {id(each): 1.0 for each in head.parameters()}


def count_per_picture(adapted: PeftModel, shape: tuple[int, int]) -> float:
    """Operations of training on one picture of `shape` (height, width), forward and backward, of a
    model on the `meta` device; 0 where it does not run without weights."""
    kind = next(parameter.dtype for parameter in adapted.parameters())
    shown = torch.empty((1, 3, *shape), dtype=kind, device="meta")
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            adapted.eval()(pixel_values=shown)["logits"].sum().backward()
    except (RuntimeError, NotImplementedError):  # it asks for a tensor's content
        return 0.0
    adapted.zero_grad()
    return float(counter.get_total_flops())


def _sum_attention_widths(config: Any) -> int:
    """Return the widths of all heads of all layers with attention over the whole context; 0 for a
    model without attention."""
    heads = read_field(config, "num_attention_heads")
    if not isinstance(heads, int) or not heads:
        return 0
    width = heads * (read_field(config, "head_dim") or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers * width
    return width * sum("attention" in kind and "linear" not in kind for kind in kinds)


def _count_weights(parameter: nn.Parameter) -> int:
    """Weights of a matrix or of a layer's experts, also in 4 bits; 0 for vectors."""
    state = getattr(parameter, "quant_state", None)
    shape = parameter.shape if state is None else state.shape
    return 0 if len(shape) < 2 else shape.numel()


def _active_share(parameter: nn.Parameter, config: Any) -> float:
    """Return the share of a parameter that works on one token: experts work on some tokens only."""
    experts = num_experts(config)
    if parameter.dim() == 3 and experts == parameter.shape[0]:
        return num_active_experts(config) / experts
    return 1.0


def find_peak(device: str, dtype: str) -> float | None:
    """Return the device's peak in operations per second in this type, by TRL's table if it has
    it."""
    found = get_peak_flops(device, dtype)
    return None if found is None else float(found)
