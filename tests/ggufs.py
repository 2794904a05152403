"""Small GGUFs of random weights, and importance matrices for them, written by the `gguf` package.

llama.cpp's rule for quantising looks at names, counts and widths only: the matrices are as wide as
real ones, and have eight rows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

ROWS = 8
Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names of tensors and their shapes, from the outside in as numpy counts."""


def decoder(
    layers: int, width: int = 256, experts: int = 0, tied: bool = False, inner: int = 0
) -> Shapes:
    """A Llama's tensors; every expert layer has a shared expert besides."""
    stacked = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    yield "token_embd.weight", (64, width)
    yield "output_norm.weight", (width,)
    if not tied:
        yield "output.weight", (64, width)
    for layer in range(layers):
        for part in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{part}.weight", (width,)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{part}.weight", (ROWS, width)
        yield f"blk.{layer}.attn_q.bias", (ROWS,)
        for part in ("ffn_up", "ffn_gate"):
            yield f"blk.{layer}.{part}{suffix}.weight", (*stacked, ROWS, width)
        yield f"blk.{layer}.ffn_down{suffix}.weight", (*stacked, ROWS, inner or 2 * width)
        if experts:
            yield f"blk.{layer}.ffn_gate_inp.weight", (experts, width)
            yield f"blk.{layer}.ffn_down_shexp.weight", (ROWS, width)


def fused(layers: int) -> Shapes:
    """The tensors of a model whose queries, keys and values are one matrix, with learnt
    positions."""
    yield "token_embd.weight", (64, 256)
    yield "position_embd.weight", (32, 256)
    yield "token_types.weight", (2, 256)
    yield "output.weight", (64, 256)
    for layer in range(layers):
        for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            yield f"blk.{layer}.{part}.weight", (ROWS, 256)
        yield f"blk.{layer}.ffn_up.bias", (ROWS,)


def latent(layers: int) -> Shapes:
    """The tensors of a model with keys and values from one latent, a small convolution and a norm
    for each head."""
    yield "token_embd.weight", (64, 256)
    for layer in range(layers):
        for part in (
            "attn_q_a",
            "attn_q_b",
            "attn_kv_a_mqa",
            "attn_kv_b",
            "attn_output",
            "ffn_up",
            "ffn_gate",
        ):
            yield f"blk.{layer}.{part}.weight", (ROWS, 256)
        yield f"blk.{layer}.ffn_down.weight", (ROWS, 1, 256)
        yield f"blk.{layer}.ssm_conv1d.weight", (ROWS, 4)
        yield f"blk.{layer}.attn_q_norm.weight", (ROWS, 256)


HEADS = {"attention.head_count": 4}
# name -> architecture, tensors, hyperparameters, number of layers
MODELS: dict[str, tuple[str, Callable[[], Shapes], dict[str, int], int]] = {
    "untied": ("llama", lambda: decoder(17), HEADS, 17),
    "tied, heads shared": (
        "llama",
        lambda: decoder(9, tied=True),
        {**HEADS, "attention.head_count_kv": 1},
        9,
    ),
    "rows of 576": ("llama", lambda: decoder(8, 576, tied=True, inner=1536), HEADS, 8),
    "rows of 96": ("llama", lambda: decoder(2, 96, inner=160), HEADS, 2),
    "rows of 80": ("qwen2", lambda: decoder(2, 80), HEADS, 2),
    "qwen2": ("qwen2", lambda: decoder(12), {**HEADS, "attention.head_count_kv": 2}, 12),
    "gemma": ("gemma", lambda: decoder(18, tied=True), HEADS, 18),
    "eight experts": (
        "llama",
        lambda: decoder(8, experts=8),
        {"expert_count": 8, "expert_used_count": 2, **HEADS},
        8,
    ),
    "four experts": (
        "llama",
        lambda: decoder(8, experts=4),
        {"expert_count": 4, "expert_used_count": 2, **HEADS},
        8,
    ),
    "three experts": (
        "llama",
        lambda: decoder(8, experts=3),
        {"expert_count": 3, "expert_used_count": 2, **HEADS},
        8,
    ),
    "70B": ("llama", lambda: decoder(80), {**HEADS, "attention.head_count_kv": 2}, 80),
    "65B": ("llama", lambda: decoder(80), HEADS, 80),
    "72B": ("qwen2", lambda: decoder(80), HEADS, 80),
    "falcon": ("falcon", lambda: fused(20), HEADS, 20),
    "gpt2": ("gpt2", lambda: fused(12), HEADS, 12),
    "latent": (
        "minicpm3",
        lambda: latent(10),
        {**HEADS, "attention.q_lora_rank": 64, "attention.kv_lora_rank": 64},
        10,
    ),
}


def write_model(path: Path, name: str, raw: str = "F32") -> None:
    """A model of MODELS, with values as weights are spread and a vocabulary of 64; matrices are of
    the type `raw`."""
    arch, shapes, hyperparameters, layers = MODELS[name]
    rng = np.random.default_rng(len(name))
    writer = gguf.GGUFWriter(path, arch)
    fixed = {
        "context_length": 64,
        "embedding_length": 256,
        "block_count": layers,
        "feed_forward_length": 512,
    }
    for key, value in {**fixed, **hyperparameters, "rope.dimension_count": 64}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        writer.add_float32(f"{arch}.attention.{key}", 1e-5)
    writer.add_file_type(0)
    writer.add_token_list([f"word {index}" for index in range(64)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 64)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for tensor, shape in shapes():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        kind = gguf.GGMLQuantizationType[raw if len(shape) > 1 else "F32"]
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)


def write_imatrix(path: Path, name: str) -> None:
    """Importance matrix for a model of MODELS: very unlike columns, experts that saw unlike numbers
    of tokens, one of them none; the embeddings' does not fit, as in files that llama-imatrix
    makes."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array("imatrix.datasets", ["some rows.jsonl", "others.jsonl"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor, shape in MODELS[name][1]():
        if len(shape) < 2:
            continue
        num = shape[0] if len(shape) > 2 else 1
        counts = np.arange(num, dtype=np.float32).reshape(num, 1) * 7 + (num == 1)
        width = 5 if tensor == "token_embd.weight" else shape[-1]
        writer.add_tensor(f"{tensor}.in_sum2", rng.random((num, width), np.float32) ** 4 * 100)
        writer.add_tensor(f"{tensor}.counts", counts)
    finish(writer)


def write_dat(path: Path, name: str, calls: int, about: bytes) -> None:
    """The same in the format before GGUF; `about` says what it was measured on, if anything."""
    rng = np.random.default_rng(1)
    shapes = [(tensor, shape) for tensor, shape in MODELS[name][1]() if len(shape) == 2]
    parts = [struct.pack("<i", len(shapes))]
    for tensor, (_, width) in shapes:
        sums = rng.random(width, np.float32) ** 4 * 100
        parts.append(
            struct.pack(f"<i{len(tensor)}sii", len(tensor), tensor.encode(), calls, width)
            + sums.tobytes()
        )
    path.write_bytes(b"".join(parts) + about)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
