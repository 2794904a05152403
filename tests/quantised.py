"""Bases that are quantised already, made of the tiny model: bitsandbytes' by transformers and
bitsandbytes themselves, FP8 by a few lines here, others as far as config.json says what they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig

NF4 = {"bnb_4bit_quant_type": "nf4"}
DOUBLY = {**NF4, "bnb_4bit_use_double_quant": True}


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copy what is not weights or configuration."""
    for file in model.iterdir():
        if file.name.startswith(("token", "chat", "generation")):
            shutil.copy(file, folder)


def save_bitsandbytes(
    model: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """A base in bitsandbytes' 4 bits, as `save_pretrained` writes it; with `load_in_8bit`, in 8."""
    if not settings.get("load_in_8bit"):
        settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, **settings}
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
    )
    network.save_pretrained(folder)
    copy_tokenizer(model, folder)
    return folder


def save_fp8(model: Path, folder: Path, block: tuple[int, int], powers: bool = False) -> Path:
    """A base with FP8 linear weights, and for each block its largest magnitude over 448 as scale;
    `powers`: the exponent, in a byte, of the power of two above it."""
    made: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj" not in name:
            made[name] = weight.bfloat16()
            continue
        rows, columns = (size // each for size, each in zip(weight.shape, block))
        parts = weight.float().reshape(rows, block[0], columns, block[1])
        scale = parts.abs().amax(dim=(1, 3)) / 448
        exponent = scale.log2().ceil()
        scale = exponent.exp2() if powers else scale
        made[name] = (parts / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = (exponent + 127).to(torch.uint8) if powers else scale
    save_configured(
        model,
        folder,
        {
            "quant_method": "fp8",
            "weight_block_size": list(block),
            "scale_fmt": "ue8m0" if powers else "float",
        },
        dtype="bfloat16",
    )
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_mxfp4(model: Path, folder: Path) -> Path:
    """A tiny gpt-oss with random MXFP4 experts: two 4-bit numbers a byte, an exponent per 32."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=512,
        hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=32, max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention"], dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config).bfloat16()
    network.save_pretrained(folder)
    copy_tokenizer(model, folder)
    made = load_file(folder / "model.safetensors")
    for name in [name for name in made if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = made.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        made[f"{name}_blocks"] = blocks
        made[f"{name}_scales"] = torch.randint(118, 122, blocks.shape[:3], dtype=torch.uint8)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": settings}))
    return folder


def save_configured(
    model: Path, folder: Path, settings: Any, field: str = "quantization_config", **more: Any
) -> Path:
    """A folder with a tokenizer and a config.json that says so, and no weights at all."""
    folder.mkdir()
    copy_tokenizer(model, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: settings, **more}))
    return folder


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter made by PEFT alone on the base as transformers loads it, B not zero."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    adapted = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **given))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def merge_plainly(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The merged weights in float32 by transformers' own dequantised load and W + s·BA."""
    network = AutoModelForCausalLM.from_pretrained(base)
    if getattr(network, "hf_quantizer", None) is not None:
        network = network.dequantize()
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged = {name: weight.float() for name, weight in network.state_dict().items()}
    for key, first in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            second = tensors[key.replace("lora_A", "lora_B")]
            merged[name] += config["lora_alpha"] / config["r"] * (second @ first)
    return merged
