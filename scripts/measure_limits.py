"""Measure what the limits of `lora merge` rest on: how far rounding moves the logits of models of
many shapes.

    python scripts/measure_limits.py [--real build/smollm2/model [--layers 2 8 30]]
                                     [--shapes NAME ...]

For each model, an adapter with B ≠ 0 by each method is merged, in bfloat16 and float16. Printed is
the largest |Δlogit| over the spread of the logits, in units of the type's epsilon: before the
weights are rounded (float32), and after. `least module` is what leaving the least important module
of all unmerged would move, before rounding, in the same unit: what the limit must not hide.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lora_cli.common import ui
from lora_cli.merge import merge
from lora_cli.models import attach, compare_logits, compute_logits, make_probes, read_adapter

TINY = Path("build/tiny/model")
LLAMA: dict[str, Any] = {"family": "llama", "num_key_value_heads": 3, "num_attention_heads": 9}
SHAPES: dict[str, dict[str, Any]] = {
    "32k, 192 wide": LLAMA | {"vocab_size": 32_000, "hidden_size": 192, "num_attention_heads": 3},
    "49k, 576 wide, 30 layers, tied": LLAMA
    | {"vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30, "tied": True},
    "128k, 1152 wide": LLAMA | {"vocab_size": 128_256, "hidden_size": 1152},
    "262k, 640 wide, one key head, tied": {
        "family": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tied": True,
    },
    "152k, 896 wide, 24 layers, biases, tied": {
        "family": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "tied": True,
    },
}
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}
DTYPES = (torch.bfloat16, torch.float16)
Case = tuple[str, Callable[[Path, torch.dtype], None], list[torch.dtype]]
"""A model's name, what writes it into a folder in a type, and the types it is measured in."""


def make_base(shape: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write a random model with the tiny model's tokenizer."""
    given = {"num_hidden_layers": 2, **shape}
    family, tied = given.pop("family"), given.pop("tied", False)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    width = given["hidden_size"]
    config = AutoConfig.for_model(
        family, **given, **ids, intermediate_size=3 * width - 64, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


def make_adapter(base: Path, folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Write an adapter whose change is some hundredth of each weight."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    adapted = get_peft_model(model, config)
    for layer in attach.find_lora_layers(adapted).values():
        size = layer.get_base_layer().weight.float().std().item()
        layer.lora_B["default"].weight.data.normal_(0, 0.02 * size * layer.in_features**0.5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)


def find_least_module(folder: Path) -> float:
    """Return the least of what leaving out one module moves the logits, over their spread and
    float32's epsilon. Some seven of the modules are tried."""
    adapter = read_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(adapter.base.name, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder)
    probes = [probe._replace(ids=probe.ids[-8:]) for probe in make_probes(adapter.load_tokenizer())]
    whole, moved = compute_logits(adapted, probes), []
    layers = list(attach.find_lora_layers(adapted).values())
    for layer in layers[:: max(1, len(layers) // 7)]:
        layer._disable_adapters = True
        found = compare_logits(whole, compute_logits(adapted, probes))
        layer._disable_adapters = False
        moved.append(found.max_abs / found.spread)
    return min(moved) / torch.finfo(torch.float32).eps


def measure(base: Path, dtype: torch.dtype, options: dict[str, Any], scratch: Path) -> list[str]:
    """Merge an adapter into the base and return the figures of a row."""
    make_adapter(base, scratch / "adapter", dtype, options)
    checked = merge.merge_adapter(read_adapter(scratch / "adapter"), scratch / "out").checked
    assert checked is not None
    assert checked.exact is not None
    assert checked.rounded is not None
    exact, rounded = (
        found.max_abs / found.spread / torch.finfo(kind).eps
        for found, kind in ((checked.exact, torch.float32), (checked.rounded, dtype))
    )
    return [
        f"{exact:.0f}",
        f"{find_least_module(scratch / 'adapter'):,.0f}",
        f"{rounded:.1f}",
        f"{checked.rounded.mean_kl:.1e}",
        f"{checked.exact.mean_kl:.1e}",
    ]


def list_real(model: Path | None, layers: list[int] | None) -> Iterator[Case]:
    """Yield a real model, or its first layers."""
    if model is None:
        return
    for number in layers or [AutoConfig.from_pretrained(model).num_hidden_layers]:
        yield (
            f"{model}, {number} layers",
            partial(cut_real, model, number),
            [torch.bfloat16],
        )


def cut_real(model: Path, number: int, folder: Path, dtype: torch.dtype) -> None:
    """Write the first layers of a model."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.model.layers = base.model.layers[:number]
    base.config.num_hidden_layers = number
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def list_random(names: list[str]) -> Iterator[Case]:
    """Yield the random models of these names."""
    for name in names:
        yield name, partial(make_base, SHAPES[name]), list(DTYPES)


def main() -> None:
    """Measure each shape, method and type, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="a model's folder, measured as it is")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", nargs="*", type=int, help="its first layers alone, so many")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name, make, dtypes in [*list_real(args.real, args.layers), *list_random(args.shapes)]:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), dtype)
                for method, options in METHODS.items():
                    with tempfile.TemporaryDirectory() as scratch:
                        found = measure(Path(folder), dtype, options, Path(scratch))
                    rows.append([name, method, str(dtype).removeprefix("torch."), *found])
                    print(rows[-1], file=sys.stderr)
    head = ["model", "method", "type", "float32", "least module", "rounded", "KL", "float32 KL"]
    print(*ui.format_table(head, rows), sep="\n")


if __name__ == "__main__":
    main()
