"""Tiny random models of every architecture that this transformers can build as a causal model.

A configuration class's defaults are those of a published model; they are made small by their names,
which hardly differ between families. `python -m tests.architectures` says which can be built.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_cli.recipe import DEFAULT_TASK

ROOT = Path(__file__).parent.parent

LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "depth", "num_blocks",
)  # fmt: skip
SIZES = {
    64: ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size", "embedding_dim"),
    96: (
        "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff", "dff",
        "d_inner", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size",
    ),
    32: ("moe_intermediate_size", "q_lora_rank", "qk_head_dim", "index_head_dim", "image_size"),
    16: (
        "head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_head",
        "mamba_d_head", "linear_key_head_dim", "linear_value_head_dim", "patch_size",
        "hidden_size_per_layer_input", "d_kv",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
        "moe_num_experts", "linear_num_value_heads",
    ),
    2: (
        "num_key_value_heads", "num_experts_per_tok", "moe_topk", "mamba_expand", "linear_num_key_heads",
        "index_n_heads", "altup_num_inputs", "moe_k",
    ),
    8: ("mamba_n_heads", "rotary_dim"),
    128: ("mamba_d_ssm",),
    1: ("n_group", "topk_group"),
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names}
LATENT = {"num_key_value_heads": 4}
"""Multi-head latent attention has as many heads for keys."""
DECODER = {"is_decoder": True}
TINY_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
    }
}
FOURTH, SIXTH = (
    {
        "num_hidden_layers": count,
        "layer_types": [*["sliding_attention"] * (count - 1), "full_attention"],
    }
    for count in (4, 6)
)
"""llama.cpp knows some families' pattern of layers by heart."""
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"first_k_dense_replace": 1},
    "longcat_flash": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "bailing_hybrid": LATENT,
    "kimi_linear": LATENT | {"linear_num_heads": 4, "linear_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlnet": {"d_head": 16, "n_head": 4},
    "zamba2": {"mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    # what llama.cpp takes for granted of a family
    "bitnet": {"tie_word_embeddings": True},
    "ernie4_5_moe": {"intermediate_size": 128},
    "exaone4": {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    "falcon": {"ffn_hidden_size": 256},
    "falcon_mamba": {"intermediate_size": 128},
    "mamba": {"intermediate_size": 128},
    "gemma3": SIXTH | {"query_pre_attn_scalar": 16},
    "gemma3_text": SIXTH | {"query_pre_attn_scalar": 16},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    "cohere2": FOURTH,
    "gemma2": {"query_pre_attn_scalar": 16},
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
    },
    "afmoe": FOURTH | {"mup_enabled": True},
    "mellum": {
        "num_hidden_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "mlp_layer_types": ["sparse"] * 4,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"]},
    "olmoe": LATENT,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_5": TINY_SECTIONS,
    "qwen3_5_text": TINY_SECTIONS,
    "qwen3_5_moe": TINY_SECTIONS,
    "qwen3_5_moe_text": TINY_SECTIONS,
    "laguna": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "num_attention_heads_per_layer": [4] * 4,
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "reformer": DECODER
    | {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (16, 16),
        "max_position_embeddings": 256,
    },
}
UNBUILT = {
    "bailing_hybrid": "groups of experts that do not shrink",
    "blt": "sizes that do not shrink",
    "cohere_compass_text": "its own defaults raise KeyError",
    "dbrx": "its own defaults raise AttributeError",
    "dots1": "its own defaults raise TypeError",
    "dots3_note": "layers named by number",
    "dots3_note_text": "layers named by number",
    "emu3": "needs a table of pictures' tokens",
    "flint": "its loss needs layers of experts, which do not shrink",
    "gemma3n": "needs timm",
    "gemma4": "layers named by number",
    "gemma4_assistant": "a part of another model",
    "gemma4_unified": "layers named by number",
    "gemma4_unified_assistant": "a part of another model",
    "git": "needs a picture",
    "hrm_text": "its cache does not shrink",
    "marian": "sizes that do not shrink",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "qwen4_exp": "its own defaults raise TypeError",
    "qwen4_exp_text": "its own defaults raise TypeError",
    "xlstm": "its kernel's state does not shrink",
    "zamba": "ties that do not shrink",
    "zamba2": "sizes that do not shrink",
}
"""Families that are not tried, and why."""
GIVEN: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 2},
    "gemma4_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "gemma4_unified_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "gemma3n_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "intermediate_size": [96, 96],
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "kimi_linear": {"num_experts_per_tok": 2, "num_experts": 4, "num_experts_per_token": 2},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "blt": {},
}
"""What a family's configuration is built from, where what it derives of its defaults does not
shrink. OWN is what else it needs to be small, or to be consistent."""


def shrink(config: PretrainedConfig, vocabulary: int) -> None:
    """Make a configuration small, in place: of its layers, the first of each kind, and two at
    least."""
    count = next((n for name in LAYERS if isinstance(n := getattr(config, name, None), int)), 0)
    kept = _choose_layers(config, count)
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value, vocabulary)
        elif _is_by_layer(value, count):
            setattr(config, name, [value[layer] for layer in kept])
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name.endswith("token_id") and value >= vocabulary:
            setattr(config, name, 0)
        elif name in LAYERS:
            setattr(config, name, len(kept))
        elif name in SMALL or name in ("vocab_size", "vocab_size_per_layer_input"):
            setattr(config, name, SMALL.get(name, vocabulary))


def _is_by_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count > 2


def _choose_layers(config: PretrainedConfig, count: int) -> list[int]:
    by_layer = [value for value in vars(config).values() if _is_by_layer(value, count)]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(str([value[layer] for value in by_layer]), layer)
    kept = list(kinds.values())[:4]
    return sorted([*kept, *(layer for layer in range(2) if layer not in kept)][: max(2, len(kept))])


def make_config(family: str, vocabulary: int, **more: Any) -> PretrainedConfig:
    """Return a small configuration of a family, with `more` fields of its own."""
    config = CONFIG_MAPPING[family](**GIVEN.get(family, {}))
    shrink(config, vocabulary)
    text = config.get_text_config()
    for name, value in (OWN.get(family, {}) | more).items():
        setattr(config if name in vars(config) or name not in vars(text) else text, name, value)
    return type(config).from_dict(config.to_dict())


def make_model(family: str, vocabulary: int = 300, **more: Any) -> PreTrainedModel:
    """Return a small random model of a family."""
    torch.manual_seed(0)
    config = make_config(family, vocabulary, **more)
    model = DEFAULT_TASK.find_auto_class(config).from_config(config)
    for tensor in model.parameters():
        if tensor.ndim > 1 and not tensor.any():  # a router of zeros prefers no expert
            torch.nn.init.normal_(tensor, std=0.02)
    return model


def make_folder(family: str, folder: Path, tokenizer: Path, **more: Any) -> Path:
    """Write a small random model of a family into `folder`, with the tokenizer of another folder;
    return it."""
    known = AutoTokenizer.from_pretrained(tokenizer)
    ids = {
        "bos_token_id": known.bos_token_id,
        "eos_token_id": known.eos_token_id,
        "pad_token_id": 0,
    }
    model = make_model(family, len(known), **ids, **more)
    model.save_pretrained(folder)
    known.save_pretrained(folder)
    if (tokenizer / "tokenizer.model").is_file():
        shutil.copy(tokenizer / "tokenizer.model", folder)
    return folder


def list_buildable() -> list[str]:
    """List the families that can be built small."""
    return [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in UNBUILT]


def main() -> None:
    """Say of each family whether it can be built and run."""
    for family in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = make_model(family).eval()
            with torch.no_grad():
                made = model(input_ids=torch.arange(12)[None] + 5, use_cache=False)
            said = f"{model.num_parameters() / 1e6:.2f}M {type(model).__name__} {tuple(made.logits.shape)}"
        except Exception as error:  # noqa: BLE001 – a survey: whatever is wrong is what it prints
            said = f"FAILS {type(error).__name__}: {' '.join(str(error).split())[:170]}"
        print(f"{family:26} {said}", flush=True)


if __name__ == "__main__":
    main()
