"""What a model is fed to be written as ONNX, and to be compared: single texts, a pair, a long one,
and batches with padding on either side."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import LoraError, library_errors
from lora_cli.models import PROBES, Base, find_positions, make_inputs, make_probes

LONG = 256
"""Tokens of the longest text, if the model reads as many: more than the windows (128) in which
layers of ModernBERT attend."""
SHORT = "List three"
"""What makes the texts of a batch different in length, where a tokenizer cuts all others."""
LEAST = 16
"""Tokens that any model reads: a tokenizer that names fewer as its limit means none."""
NAMES = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch", 1: "sequence"}
"""What may be of any size, of each of these."""
PIXELS = "pixel_values"
"""What models of pictures take."""

Row = dict[str, list[int]]
"""One text: its token ids, and what belongs to each of them."""


class Feed(NamedTuple):
    """What a model is given at once: tensors by the names of its arguments, (texts, tokens)."""

    inputs: dict[str, torch.Tensor]

    @property
    def axes(self) -> dict[int, str]:
        """What may be of any size: of pictures, how many they are."""
        return {0: AXES[0]} if PIXELS in self.inputs else AXES

    @property
    def text(self) -> torch.Tensor:
        """Which places hold text, and not padding: (texts, tokens); of pictures, each is one."""
        if PIXELS in self.inputs:
            return torch.ones(len(self.inputs[PIXELS]), 1).bool()
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.inputs["input_ids"]).bool() if mask is None else mask.bool()


def make_feeds(model: Base, network: PreTrainedModel) -> list[Feed]:
    """Return what the network of a model is compared on: first a batch padded where the tokenizer
    pads, the same batch padded on the other side, then single texts. Raises LoraError where it asks
    for what a text does not have, or its tokenizer fails."""
    if model.task.reads_pictures:
        pictures = [
            make_inputs(network, probe)[PIXELS] for probe in make_probes(model.load_reader())
        ]
        together = Feed({PIXELS: torch.cat(pictures)})
        return [together, together, *(Feed({PIXELS: each}) for each in pictures)]
    tokenizer = model.load_tokenizer()
    names = _find_names(model, network, tokenizer)
    encode = _Encoder(tokenizer, names, _find_longest(model, tokenizer))
    refused = f"the tokenizer of {model} does not read what models are compared on"
    with library_errors.translate_file_errors(refused, "copy its files again"):
        rows = [encode(probe.text, special=probe.plain) for probe in make_probes(tokenizer)]
        others = [encode(PROBES[0], PROBES[2]), encode(" ".join(PROBES * LONG))]
        batch = [*rows, encode(SHORT)]
    pad = _find_padding(tokenizer, network)
    right = tokenizer.padding_side == "right"
    batches = [_join(batch, pad, side) for side in (right, not right)]
    return [*batches, *(_join([row], pad, True) for row in [*rows, *others])]


def _find_names(
    model: Base, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return what the tokenizer makes of a text that the model takes."""
    taken = inspect.signature(network.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in taken]
    if strange := [name for name in names if name not in NAMES]:
        raise LoraError(
            f"{model} takes {' and '.join(strange)} beside a text",
            "only models of texts alone are written as ONNX",
        )
    return names


def _find_longest(model: Base, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the longest text may have."""
    positions, own = find_positions(model), tokenizer.model_max_length
    ends = positions.number if positions and positions.ends else LONG
    return min(LONG, ends, int(own) if isinstance(own, (int, float)) and own >= LEAST else LONG)


def _find_padding(tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel) -> int:
    """Return the token that fills short texts: the tokenizer's, else the one by which decoders find
    where a text ends."""
    known = tokenizer.pad_token_id, network.config.get_text_config().pad_token_id
    return next((int(number) for number in known if number is not None), 0)


class _Encoder:
    """Makes rows of texts, cut where they are too long."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], longest: int
    ) -> None:
        self.tokenizer, self.names, self.longest = tokenizer, names, longest

    def __call__(self, *texts: str, special: bool = True) -> Row:
        made: Any = self.tokenizer(
            *texts, truncation=True, max_length=self.longest, add_special_tokens=special
        )
        return {name: made[name] for name in self.names}


def _join(rows: Sequence[Row], pad: int, right: bool) -> Feed:
    """Return rows as one batch, filled up on the right or the left; no attention goes there."""
    longest = max(len(row["input_ids"]) for row in rows)
    joined: dict[str, torch.Tensor] = {}
    for name in rows[0]:
        filler = pad if name == "input_ids" else 0
        filled = []
        for row in rows:
            more = [filler] * (longest - len(row[name]))
            filled.append([*row[name], *more] if right else [*more, *row[name]])
        joined[name] = torch.tensor(filled)
    return Feed(joined)
