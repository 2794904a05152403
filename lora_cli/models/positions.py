"""Find how long a text a model reads: the positions that its configuration speaks of."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig

from lora_cli.models import decoder
from lora_cli.models.base import Base

TABLE = re.compile(r"(^|\.)(wpe|\w*pos\w*)$")
"""What models that look positions up in a table call it: GPT-2's wpe, OPT's embed_positions."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Rotary scalings whose factor says how much further than its first positions a model reads."""


class Positions(NamedTuple):
    """How many tokens of one text a model was made for."""

    number: int
    ends: bool
    """Whether it has no place for a token beyond them: a table is looked up in. Rotary embeddings
    are computed for any number, though no text as long was trained on."""


def find_positions(base: Base, of_target: bool = False) -> Positions | None:
    """Return a base's positions, for what it reads or, beside an encoder, what its decoder writes;
    None where its configuration knows no limit, as with ALiBi, or it reads pictures."""
    if base.task.reads_pictures:
        return None
    text = base.config.get_text_config()
    count = decoder.find_room(text, of_target)
    if count is None or count < 1:
        return None
    network = base.build_empty()
    inputs = network.get_input_embeddings()
    tables = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and module is not inputs and TABLE.search(name)
    }
    # RoBERTa's first place is the one after that of padding
    used = [
        table.num_embeddings - table.padding_idx - 1
        for table in tables.values()
        if table.padding_idx is not None
    ]
    if tables or any(TABLE.search(name) for name, _ in network.named_buffers()):
        return Positions(min([count, *used]), True)
    return Positions(_stretch(text, count), False)


def _stretch(text: PretrainedConfig, count: int) -> int:
    """Return the positions that rotary scaling makes of a configuration's `count`."""
    found: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    nested = [each for each in found.values() if isinstance(each, dict)]
    for rope in nested or [found]:  # some models have one for each kind of layer
        if rope.get("rope_type") in STRETCHED and isinstance(rope.get("factor"), (int, float)):
            first = rope.get("original_max_position_embeddings") or count
            count = max(count, int(first * rope["factor"]))
    return count
