"""Models of given shapes with random weights, made on the device, and rows to train on."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import bench_train
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_parts.part import Bench, Figures, NotHereError

ROOT = bench_train.ROOT
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "deep": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    },
    "wide": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000,
    },
}  # fmt: skip
"""Llama 3.2 1B and Llama 3.1 8B; one as deep as the latter; one whose steps take memory."""
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip
"""What a dry run has instead."""


def make_model(bench: Bench, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Return the folder of a random model of this shape, made when it is first asked for. Its
    tokenizer is the tiny model's, whose tokens are the first of the vocabulary."""
    folder = _find_folder(bench, name)
    if folder.is_dir():
        return folder
    shape = SHAPES[name] | (SMALL if bench.small else {})
    config = LlamaConfig(**shape, max_position_embeddings=1 << 17, dtype=dtype)
    with torch.device("meta"):
        network = LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator(bench.clock.device).manual_seed(0)
    network = network.to_empty(device=bench.clock.device)
    network.tie_weights()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
    size = sum(2 * parameter.numel() for parameter in network.parameters())
    if size > 0.9 * shutil.disk_usage(bench.scratch).free:
        raise NotHereError(f"there is no room for {size / 1e9:.0f} GB in {bench.scratch}")
    making = folder.with_suffix(".making")
    network.save_pretrained(making)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bench.tiny / "model" / file, making)
    making.replace(folder)  # whole, or not there: a process may be killed while it writes
    return folder


def _find_folder(bench: Bench, name: str) -> Path:
    return bench.scratch / "models" / name


def find_made(bench: Bench, name: str) -> Path:
    """Return the folder of a model that a case before was to make. NotHereError without it."""
    folder = _find_folder(bench, name)
    if not folder.is_dir():
        raise NotHereError(f"the {name} model was not made")
    return folder


def measure_making(bench: Bench, name: str) -> Figures:
    """Make a model; return its size. A case of its own, so that no other is taken to hang."""
    folder = make_model(bench, name)
    return {"on_disk_gb": sum(file.stat().st_size for file in folder.iterdir()) / 1e9}


def write_even_rows(bench: Bench, length: int, number: int) -> Path:
    """Write rows of ids, all as long, of which every token but some 45 % has a label; return their
    file."""
    given = argparse.Namespace(data=None, rows=number, length=length, max_length=length)
    return _write(bench, f"{number}-of-{length}", given)


def write_mixed_rows(bench: Bench, number: int, longest: int) -> Path:
    """Write rows with the lengths of Alpaca's; return their file."""
    given = argparse.Namespace(data=None, rows=number, length=0, max_length=longest)
    return _write(bench, f"{number}-mixed", given)


def _write(bench: Bench, name: str, given: argparse.Namespace) -> Path:
    path = bench.scratch / "rows" / f"{name}.jsonl"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        bench_train.write_rows(path, given)
    return path


def count_tokens(path: Path) -> list[int]:
    """Return the length of each row."""
    return [len(json.loads(line)["input_ids"]) for line in path.read_text().splitlines()]
