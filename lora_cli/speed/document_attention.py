"""Let each document of a packed sequence attend by itself.

On a CPU, torch's attention does not know documents: a mask keeps them apart, and the work is that
of one long text, quadratic in the sequence's length. Here each document goes through it alone,
causal and without a mask, which is the same function for the work of the documents. On CUDA, flash
attention does so itself, given `position_ids`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_document"
# Tokens up to which the backward pass is faster in float32 than in bfloat16, which torch's kernel
# keeps converting (5 heads of 64, one thread: 0.17 against 0.54 ms at 32 tokens, 0.87 against 2.2
# at 126, 2.4 against 3.1 at 256)
SHORT = 256


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' sdpa returns for (batch, heads, tokens, width), computed document
    by document.

    A document begins where `position_ids` (1, tokens) do not go up by one, as transformers takes it
    when it makes its masks. A single document goes to transformers' own function.
    """
    lengths = _find_documents(module, query, key, kwargs)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    return torch.cat([_attend_one(module, piece, kwargs) for piece in pieces], dim=1), None


def _attend_one(module: nn.Module, one: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return one document's attention, (1, tokens, heads, width)."""
    query, key, value = one
    half = all(tensor.dtype == torch.bfloat16 for tensor in one)
    short = query.shape[2] <= SHORT
    plain = not kwargs.get("dropout") and query.shape[-1] == value.shape[-1]
    if not (half and short and plain):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
    groups = query.shape[1] // key.shape[1]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return _ShortAttention.apply(
        query, repeat_kv(key, groups), repeat_kv(value, groups), scale
    ).transpose(1, 2)


class _ShortAttention(torch.autograd.Function):
    """torch's attention in bfloat16, with the backward pass computed in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        made, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal=True, scale=scale
        )
        ctx.save_for_backward(query, key, value, made, sums)
        ctx.scale = scale
        return made

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        *kept, sums = ctx.saved_tensors
        whole = [tensor.float() for tensor in (above[0], *kept)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *whole, sums, 0.0, is_causal=True, scale=ctx.scale
        )
        return *(gradient.to(above[0].dtype) for gradient in gradients), None


def _find_documents(
    module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> list[int] | None:
    """Return the documents' lengths; None for a single one, or where the attention is not plainly
    causal.

    Attention that only reaches a window's length counts as causal if each document lies within it.
    """
    positions = kwargs.get("position_ids")
    if (
        positions is None
        or positions.shape != (1, query.shape[2])
        or key.shape[2] != query.shape[2]
    ):
        return None
    if (
        kwargs.get("is_causal", getattr(module, "is_causal", True)) is False
        or kwargs.get("position_bias") is not None
    ):
        return None
    begins = (positions[0].diff() != 1).nonzero()[:, 0] + 1
    cuts = [0, *begins.tolist(), positions.shape[1]]
    lengths = [end - start for start, end in zip(cuts, cuts[1:])]
    limits = [getattr(module.config, name, None) for name in REACHES]
    reach = min((limit for limit in limits if limit), default=max(lengths))
    return lengths if len(lengths) > 1 and max(lengths) <= reach else None


# Fields of a model's configuration that limit how far its attention reaches: a document within the
# limit is seen as a whole
REACHES = ("sliding_window", "attention_chunk_size", "local_attention")


def install(model: PreTrainedModel) -> bool:
    """Let a model on a CPU that uses sdpa attend by document; return whether it does."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    # compiled, it would be compiled again for each set of lengths
    AttentionInterface.register(NAME, torch.compiler.disable(attend_by_document))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
