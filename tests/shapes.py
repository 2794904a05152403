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
    "Qwen3-14B-Base": _llama(
        5120, 17408, 40, 40, model_type="qwen3", architectures=["Qwen3ForCausalLM"],
        vocab_size=151936, head_dim=128, max_position_embeddings=32768,
    ),
    "Qwen2.5-1.5B-Instruct": _llama(
        1536, 8960, 28, 12, model_type="qwen2", architectures=["Qwen2ForCausalLM"],
        vocab_size=151936, num_key_value_heads=2, max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    **dict.fromkeys(
        ("SmolLM2-135M", "SmolLM2-135M-Instruct"),
        _llama(
            576, 1536, 30, 9, vocab_size=49152, num_key_value_heads=3,
            max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    ),
    **dict.fromkeys(
        ("SmolLM2-360M", "SmolLM2-360M-Instruct"),
        _llama(
            960, 2560, 32, 15, vocab_size=49152, num_key_value_heads=5,
            max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    ),
    "ModernBERT-base": {
        "model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"],
        "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152,
        "num_hidden_layers": 22, "num_attention_heads": 12, "max_position_embeddings": 8192,
        "torch_dtype": "float32",
    },
    "flan-t5-base": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
        "num_decoder_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "is_encoder_decoder": True, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1,
    },
    "vit-base-patch16-224-in21k": {
        "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16,
    },
}  # fmt: skip


def write_base(name: str, folder: Path, tokenizer: Path) -> Path:
    """Write a base's configuration into `folder`, with the tokenizer of another folder; return
    it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder
