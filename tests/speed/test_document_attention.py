"""Attention by document: transformers' own sdpa, with its masks, is the oracle, for logits and
gradients.

Hermetic: random models of several families. Alone: pytest tests/speed/test_document_attention.py
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from lora_cli.speed import document_attention, step_packing

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 64},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 64,
        "query_pre_attn_scalar": 16,
    },
    "olmo2": {},
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
}


def pair(
    family: str, dtype: torch.dtype = torch.float32, **more
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model as transformers runs it, and a copy that attends by document."""
    options = {
        **SHAPE,
        **FAMILIES[family],
        "vocab_size": 300,
        "attn_implementation": "sdpa",
        **more,
    }
    torch.manual_seed(0)
    stock = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).to(dtype).eval()
    )
    ours = copy.deepcopy(stock)
    assert document_attention.install(ours)
    assert stock.config._attn_implementation == "sdpa"
    return stock, ours


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    """One sequence of documents of these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": torch.arange(sum(lengths))[None] * 37 % 300, "position_ids": positions}


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    torch.manual_seed(1)
    (logits.float() * torch.randn(logits.shape)).sum().backward()
    return [
        logits.detach(),
        *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the documents that attended alone, in the order they did."""
    seen: list[int] = []
    own = document_attention._attend_one
    monkeypatch.setattr(
        document_attention,
        "_attend_one",
        lambda *given: seen.append(given[1][0].shape[2]) or own(*given),
    )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_transformers_own_logits_and_gradients(
    family: str, alone: list[int]
) -> None:
    stock, ours = pair(family)
    inputs = packed(5, 1, 40, 18)
    for expected, given in zip(run(stock, inputs), run(ours, inputs), strict=True):
        torch.testing.assert_close(
            given, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )
    assert alone == [5, 1, 40, 18] * 2
    assert step_packing.find_unsuitable(ours) is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_bfloat16_the_gradients_are_no_farther_from_float32_than_torch_s(
    family: str, alone: list[int]
) -> None:
    inputs = packed(5, 1, 40, 300)
    exact = run(pair(family)[0], inputs)
    far = []
    for model in pair(family, torch.bfloat16):
        found = run(model, inputs)
        far.append(
            [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        )
    assert alone == [5, 1, 40, 300] * 2
    assert all(ours < 1.5 * stock + 1e-3 for stock, ours in zip(*far)), far
    assert sum(far[1]) < 1.25 * sum(far[0])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_document_longer_than_the_window_keeps_its_mask(family: str, alone: list[int]) -> None:
    stock, ours = pair(family)
    inputs = packed(100, 20)
    for expected, given in zip(run(stock, inputs), run(ours, inputs), strict=True):
        torch.testing.assert_close(
            given, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )
    assert not alone


def test_padded_rows_single_documents_and_generation_are_as_they_were(alone: list[int]) -> None:
    stock, ours = pair("llama")
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    padded = {"input_ids": torch.arange(18).view(2, 9), "attention_mask": mask}
    single = {"input_ids": torch.arange(12)[None]}
    for inputs in (padded, single, packed(12)):
        assert torch.equal(stock(**inputs).logits, ours(**inputs).logits)
    said = [
        model.generate(**padded, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (stock, ours)
    ]
    assert torch.equal(*said)
    assert not alone


def test_other_implementations_are_left_alone() -> None:
    options = {**SHAPE, **FAMILIES["llama"], "vocab_size": 300, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options))
    assert not document_attention.install(model)
    assert model.config._attn_implementation == "eager"


def attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    bounds_of_keys: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's kernel computes on CUDA, (tokens, heads, width), document by document."""
    assert bounds.dtype == torch.int32
    assert bounds is bounds_of_keys
    assert window_size == (-1, 0)
    assert longest == longest_key == bounds.diff().max()
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        )[0].transpose(0, 1)
        for start, end in pairwise(bounds.tolist())
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_kernel_for_all_documents_is_given_what_it_needs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = pair(family)
    document_attention.remove(ours)
    monkeypatch.setattr(document_attention, "varlen_attn", attend_each)
    document_attention.use_kernel(ours)
    assert document_attention.takes_bounds(ours)
    inputs = packed(5, 1, 40, 18)
    bounds = torch.tensor([0, 5, 6, 46, 64], dtype=torch.int32)
    given = run(ours, inputs | document_attention.describe_documents(bounds, 40))
    for one, expected in zip(given, run(stock, inputs), strict=True):
        torch.testing.assert_close(
            one, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )
    assert step_packing.find_unsuitable(ours) is None
    with pytest.raises(ValueError, match="softcap"):
        document_attention.attend_in_one_kernel(
            ours, *[torch.ones(1, 1, 2, 4)] * 3, None, cu_seq_lens_q=bounds, softcap=30.0
        )


@pytest.mark.parametrize(
    ("family", "more", "dtype", "capability", "suits"),
    [
        ("llama", {}, torch.bfloat16, (8, 0), True),
        ("llama", {}, torch.float16, (9, 0), True),
        ("llama", {}, torch.float32, (9, 0), False),
        ("llama", {}, torch.float16, (7, 5), False),
        ("llama", {"attention_dropout": 0.1}, torch.bfloat16, (8, 0), False),
        ("mistral", {}, torch.bfloat16, (8, 0), True),
        ("mistral", {"sliding_window": 63}, torch.bfloat16, (8, 0), False),
        ("llama", {"index_topk": 16}, torch.bfloat16, (8, 0), False),
    ],
)
def test_the_kernel_is_tried_where_it_may_do(
    family: str,
    more: dict,
    dtype: torch.dtype,
    capability: tuple[int, int],
    suits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock, _ = pair(family, dtype)
    for name, value in more.items():
        setattr(stock.config, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(type(stock), "device", torch.device("cuda"))
    assert document_attention.install(stock, longest=64) is suits
    assert not document_attention.install(stock)  # padded batches need their mask


def test_a_mask_of_a_model_s_own_is_no_attention_for_the_kernel() -> None:
    rows = [torch.ones(1, 1, 2, 4)] * 3
    for bounds in ({}, {"cu_seq_lens_q": torch.tensor([0, 2], dtype=torch.int32)}):
        with pytest.raises(ValueError, match="a mask of its own"):
            document_attention.attend_in_one_kernel(
                torch.nn.Identity(), *rows, torch.zeros(1, 1, 2, 2), **bounds
            )


@pytest.mark.parametrize(
    ("family", "looks"),
    [
        ("deepseek_v32", True),
        ("glm_moe_dsa", True),
        ("axk2", True),
        ("hy_v4", True),
        ("falcon", True),
        ("llama", False),
        ("gpt2", False),
        ("gemma3_text", False),
    ],
)
def test_what_looks_for_sdpa_by_name_keeps_it(
    family: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]
    assert document_attention.looks_for_sdpa(kind) is looks
    stock, _ = pair("llama")
    monkeypatch.setattr(type(stock), "__module__", kind.__module__)
    assert document_attention.install(stock) is not looks
