"""The configurations of published bases, as their config.json has them, without their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """A Llama 3's configuration."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Mistral-7B-v0.3": _llama(
        4096, 14336, 32, 32, model_type="mistral", architectures=["MistralForCausalLM"],
        vocab_size=32768, max_position_embeddings=32768, head_dim=128, sliding_window=None,
    ),
    "Qwen2.5-7B": _llama(
        3584, 18944, 28, 28, model_type="qwen2", architectures=["Qwen2ForCausalLM"],
        vocab_size=152064, num_key_value_heads=4,
    ),
    "Qwen3-8B-Base": _llama(
        4096, 12288, 36, 32, model_type="qwen3", architectures=["Qwen3ForCausalLM"],
        vocab_size=151936, head_dim=128, max_position_embeddings=32768,
    ),
    "OLMo-2-0425-1B": _llama(
        2048, 8192, 16, 16, model_type="olmo2", architectures=["Olmo2ForCausalLM"],
        vocab_size=100352, num_key_value_heads=16, max_position_embeddings=4096,
        torch_dtype="float32",
    ),
}  # fmt: skip


def write_base(name: str, folder: Path, tokenizer: Path) -> Path:
    """Write a base's configuration into `folder`, with the tokenizer of another folder; return
    it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder
