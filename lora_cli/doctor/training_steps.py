"""One training step by each method on this machine's device, as `lora train` makes it.

A network of some thousand weights is written into a folder that goes away, with rows of numbers,
and trained by the program's own run: the base loaded where it trains, the adapter on it, what is
quicker there, packed rows, the loss, the optimiser, the adapter saved. What fails there fails in
every recipe of the method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from lora_cli.common import LoraError, devices, files, library_errors, ui
from lora_cli.recipe import load_recipe
from lora_cli.train import run

METHODS = ("lora", "qlora", "dora", "qdora")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
LETTERS = "▁abcdefghijklmnopqrstuvwxyz "
WORDS = len(SPECIAL) + len(LETTERS)
RECIPE = {
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "training": {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 32,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
    },
}


class Step(NamedTuple):
    """How a method's step went: the seconds it took with all around it, or what was wrong."""

    method: str
    device: str
    seconds: float
    said: str | None = None
    fix: str | None = None


def try_methods() -> Iterator[Step]:
    """Make a training step by each method, and yield how it went."""
    with files.scratch_folder() as folder, ui.hush():
        _write_base(folder / "base")
        recipe = _write_recipe(folder)
        for method in METHODS:
            device = str(devices.find_device(in_4bit=method.startswith("q")))
            started = time.perf_counter()
            problem = _try_method(recipe, method, folder / method)
            seconds = time.perf_counter() - started
            yield Step(method, device, seconds, *(problem or (None, None)))


def _try_method(recipe: Path, method: str, output: Path) -> tuple[str, str | None] | None:
    """Make one step by a method; what was wrong, and what mends it if that is known."""
    try:
        run.train(load_recipe(recipe, [f"method={method}", f"output_dir={output}"]))
    except Exception as error:  # of any type: it is what is asked here
        root = error
        while isinstance(root.__cause__, Exception):  # a refusal of the recipe speaks of its keys
            root = root.__cause__
        known = root if isinstance(root, LoraError) else library_errors.translate(root)
        if known is not None:
            return known.message, known.hint
        last = (str(root).strip().splitlines() or [""])[-1]
        return f"{type(root).__name__}: {last[:300]}", None
    return None


def _write_base(folder: Path) -> None:
    """Write a small random Llama and a tokenizer of letters."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *LETTERS])}
    LlamaTokenizer(vocab=vocabulary, merges=[], **SPECIAL).save_pretrained(folder)


def _write_recipe(folder: Path) -> Path:
    """Write rows of several lengths, so that they are packed, and the recipe of all methods."""
    rows = [[3 + (7 * row + place) % (WORDS - 3) for place in range(6 + row)] for row in range(4)]
    lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in rows]
    files.write_text(folder / "rows.jsonl", "\n".join(lines) + "\n")
    made = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"path": str(folder / "rows.jsonl"), "format": "tokens"},
        **RECIPE,
    }
    files.write_text(folder / "recipe.yaml", json.dumps(made))
    return folder / "recipe.yaml"
