"""Let each document of a packed sequence attend by itself.

torch's attention does not know documents: a mask keeps them apart, and the work is that of one long
text, quadratic in the sequence's length. On a CPU each document goes through it alone here, causal
and without a mask, which is the same function for the work of the documents. On CUDA one kernel of
torch's takes them all, where they begin in one tensor: that of flash attention for texts of various
lengths. Flash attention from its own package takes the same.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_document"
VARLEN = "varlen"
TAKE_BOUNDS = (VARLEN, "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Names of attention that is given where documents begin."""
OTHER = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of attention that is more than a product, a softmax and a product."""
BY_NAME = re.compile(r"_attn_implementation\s*(==|in)\s*[\"'(\[][^\n]*sdpa")
DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout")
"""A configuration's fields for dropout in attention."""
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
    reach = _find_reach(module.config, max(lengths))
    return lengths if len(lengths) > 1 and max(lengths) <= reach else None


def _find_reach(config: Any, length: int) -> int:
    """Return how far attention reaches that may be limited, in tokens; `length` where it is not."""
    limits = [getattr(config, name, None) for name in REACHES]
    return min((limit for limit in limits if limit), default=length)


# Fields of a model's configuration that limit how far its attention reaches: a document within the
# limit is seen as a whole
REACHES = ("sliding_window", "attention_chunk_size", "local_attention")


def attend_in_one_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' sdpa returns for (1, heads, tokens, width), from one kernel that is
    told where documents begin (`describe_documents`).

    Without that the tokens are one document. Raise ValueError for attention that is more: no mask
    is made for this one, so that any is a model's own.
    """
    if attention_mask is not None:
        raise ValueError("attention with a mask of its own")
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    given = [name for name in OTHER if kwargs.get(name) is not None]
    if given or kwargs.get("dropout") or kwargs.get("is_causal") is False:
        raise ValueError(f"attention with {', '.join(given) or 'dropout or without an order'}")
    options: dict[str, Any] = {"scale": kwargs.get("scaling")} | CAUSAL
    if "enable_gqa" in TAKEN and query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True  # before it was asked for, the kernel did it unasked
    longest = kwargs["max_length_q"]
    rows = [tensor.squeeze(0).transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
    made = varlen_attn(*rows, bounds, bounds, longest, longest, **options)
    return made[None], None


TAKEN = inspect.signature(varlen_attn).parameters
CAUSAL = {"window_size": (-1, 0)} if "window_size" in TAKEN else {"is_causal": True}


def describe_documents(bounds: Tensor, longest: int) -> dict[str, Any]:
    """Return what attention that takes bounds is given of a sequence: where its documents begin,
    and the end (int32), and the longest one's length."""
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def takes_bounds(model: PreTrainedModel) -> bool:
    """Return whether a model's attention is to be told where documents begin."""
    return model.config._attn_implementation in TAKE_BOUNDS


def install(model: PreTrainedModel, longest: int | None = None) -> bool:
    """Let a model that uses sdpa attend by document; return whether it does.

    On CUDA only where all it will see are packed sequences (`step_packing`) of documents of up to
    `longest` tokens: no mask is made.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    if looks_for_sdpa(type(model)):
        return False
    if model.device.type == "cuda" and longest is not None:
        capability = torch.cuda.get_device_capability(model.device)
        if suits_kernel(model.config, model.dtype, capability, longest):
            use_kernel(model)
            return True
    if model.device.type != "cpu":
        return False
    # compiled, it would be compiled again for each set of lengths
    AttentionInterface.register(NAME, torch.compiler.disable(attend_by_document))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def looks_for_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Return whether a family's own code asks whether attention is called sdpa: by another name
    Falcon computes it eagerly, and those that choose which tokens to attend to, such as
    DeepSeek-V3.2 and GLM-5, attend to all."""
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    return file is not None and BY_NAME.search(Path(file).read_text(encoding="utf-8")) is not None


def use_kernel(model: PreTrainedModel) -> None:
    """Let a model attend through `attend_in_one_kernel`; no mask is made then."""
    AttentionInterface.register(VARLEN, attend_in_one_kernel)
    model.set_attn_implementation(VARLEN)


def remove(model: PreTrainedModel) -> None:
    """Undo `install`."""
    model.set_attn_implementation("sdpa")


def suits_kernel(
    config: PretrainedConfig, dtype: torch.dtype, capability: tuple[int, int], longest: int
) -> bool:
    """Return whether flash attention's kernel may do for documents of up to `longest` tokens in a
    model of this type, on CUDA of this capability; whether it does, `step_packing` tries."""
    config = config.get_text_config()
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return False
    if any(getattr(config, name, None) for name in (*DROPOUT, "index_topk")):
        return False
    return _find_reach(config, longest) >= longest
