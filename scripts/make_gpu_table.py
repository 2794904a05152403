"""Make the table of docs/how-to/gpu.md anew: what the memory plan says of each base, method and
card.

    python scripts/make_gpu_table.py        five minutes, in one thread; no GPU, no weights, no hub

The figures are `lora plan`'s, for published bases' configurations and a recipe of defaults. Memory
grows by the same amount with each layer, so a base is rehearsed with two layers and with three, and
the rest is counted up; tests/plan/test_gpu_table.py holds that against a base of its whole depth.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from lora_cli.common import ui
from lora_cli.plan import auto, hardware, memory, outlook
from lora_cli.recipe import Recipe, load_recipe

DOCUMENT = Path(__file__).parent.parent / "docs" / "how-to" / "gpu.md"
BEGIN, END = "<!-- made by scripts/make_gpu_table.py -->\n", "<!-- end of what is made -->\n"
METHODS = ("lora", "qlora", "dora", "qdora")
LENGTHS = (1024, 2048, 4096, 8192)
DEPTHS = (2, 3)
CARDS = {
    "RTX 4060": "8 GB",
    "RTX 3060": "12 GB",
    "T4": "T4, 16 GB",
    "RTX 4080": "16 GB",
    "RTX 4090": "24 GB",
    "A100-40GB": "40 GB",
    "A6000": "48 GB",
    "H100": "80 GB",
}
"""A card of each size, and what the table calls it."""


class Shape(NamedTuple):
    """A published base's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = False
    family: type[PretrainedConfig] = LlamaConfig

    def configure(self, layers: int) -> PretrainedConfig:
        """Return its configuration, with so many layers."""
        return self.family(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            tie_word_embeddings=self.tied,
            max_position_embeddings=131072,
            dtype="bfloat16",
        )


SHAPES = {
    "0.5B (Qwen2.5)": Shape(896, 4864, 24, 14, 2, 151936, tied=True, family=Qwen2Config),
    "1B (Llama 3.2)": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "3B (Llama 3.2)": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "8B (Llama 3.1)": Shape(4096, 14336, 32, 32, 8, 128256),
    "14B (Qwen2.5)": Shape(5120, 13824, 48, 40, 8, 152064, family=Qwen2Config),
    "32B (Qwen2.5)": Shape(5120, 27648, 64, 40, 8, 152064, family=Qwen2Config),
    "70B (Llama 3.1)": Shape(8192, 28672, 80, 64, 8, 128256),
}


def make_recipe(method: str, checkpointing: bool, length: int) -> Recipe:
    """Return a recipe of defaults for rows up to `length` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text("model: {name_or_path: x, dtype: bfloat16}\ndata: {path: x}\n")
        given = {
            "method": method,
            "lora.r": "16",
            "training.gradient_checkpointing": str(checkpointing).lower(),
            "training.optim": outlook.FASTEST_OPTIMIZER,
            "training.max_length": str(length),
            "training.packed_length": str(LENGTHS[0]),  # `auto` would fill the card
        }
        return load_recipe(path, [f"{key}={value}" for key, value in given.items()])


def count_bytes(shape: Shape, method: str, checkpointing: bool, layers: int) -> list[int]:
    """Return the bytes of a step for each of LENGTHS, as `lora plan` counts them on a GPU."""
    device = hardware.parse_gpu("24GB")
    config = shape.configure(layers)
    recipes = [make_recipe(method, checkpointing, length) for length in LENGTHS]
    settled = [auto.settle(recipe, config, device)[0] for recipe in recipes]
    forecast = memory.make_forecast(settled[0], config, device)
    return [forecast.need(memory.largest_batch(recipe)).total for recipe in settled]


def foresee(shape: Shape, method: str, checkpointing: bool) -> list[int]:
    """Return the bytes for the whole depth, on the line through those of DEPTHS."""
    few, more = (count_bytes(shape, method, checkpointing, depth) for depth in DEPTHS)
    share = (shape.layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return [round(low + (high - low) * share) for low, high in zip(few, more)]


def find_longest(needs: list[int], room: int) -> str:
    """Return the longest of LENGTHS that fits, in words; – for none."""
    fitting = [length for length, need in zip(LENGTHS, needs) if need <= room]
    return f"{fitting[-1] // 1024}k" if fitting else "–"


def make_row(name: str, method: str) -> str:
    """Return a row of the table."""
    plain, saving = (
        foresee(SHAPES[name], method, checkpointing) for checkpointing in (False, True)
    )
    cells = []
    for card in CARDS:
        room = hardware.parse_gpu(card).memory
        without, with_it = find_longest(plain, room), find_longest(saving, room)
        cells.append(with_it if without == with_it else f"{with_it} ({without})")
    return f"| {name} | `{method}` | {' | '.join(cells)} |\n"


def make_rows() -> Iterator[str]:
    """Make the whole table, line by line."""
    yield f"| base | method | {' | '.join(CARDS.values())} |\n"
    yield f"|---|---|{'---|' * len(CARDS)}\n"
    for name in SHAPES:
        for method in METHODS:
            yield make_row(name, method)


def main() -> None:
    """Write the table into the document, or into the one that is named."""
    warnings.simplefilter("ignore")
    document = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENT
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = []
    for row in make_rows():
        made.append(row)
        ui.say(row.rstrip())
    document.write_text(f"{before}{BEGIN}{''.join(made)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
