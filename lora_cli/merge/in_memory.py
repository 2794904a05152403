"""Merge with the whole model in memory, by PEFT's `merge_and_unload`: for what cannot be merged
tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.common import LoraError, RejectedError, ui
from lora_cli.merge import output, streaming
from lora_cli.models import (
    Adapter,
    Base,
    Probe,
    attach,
    compute_logits,
    convert_to_float32,
    find_statistics,
    is_finite,
    tensors,
)

SHARD_SIZE = "5GB"


class Whole:
    """The way to merge with the whole model in memory."""

    is_repeatable = False
    """Merging again goes by blocks of rows, which may take another kernel than the whole tensor."""

    def __init__(self, adapter: Adapter, original: bool) -> None:
        self.adapter, self.original = adapter, original
        self.adapted: PeftModel | None = None
        self.folded: tuple[PreTrainedModel, int] | None = None
        self.sums: dict[str, int] = {}
        self.loaded: PreTrainedModel | None = None

    def compute_expected(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """Return logits of base with adapter, on the weights that are merged into; both stay in
        memory for `write`."""
        self.adapted = self._load(original=self.original)
        return compute_logits(self.adapted, probes)

    def compute_on_other_weights(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """Return the same on the other weights of an adapter trained in 4 bits."""
        return compute_logits(self._load(original=not self.original), probes)

    def _load(self, original: bool) -> PeftModel:
        """Return base with adapter in float32, quantised weights dequantised."""
        base = convert_to_float32(self.adapter.load_plain_base(original))
        return attach.load_adapter(base, self.adapter.folder)

    def compute_unrounded(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """Return logits of the merged model before its weights are rounded; it stays in memory for
        `write`."""
        self.folded = self._fold()
        return compute_logits(self.folded[0], probes)

    def compute_rounded(self, probes: Sequence[Probe], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the same with each weight rounded once to `dtype`."""
        plain, _ = self._fold()
        round_once(plain, dtype)
        return compute_logits(convert_to_float32(plain), probes)

    def _fold(self) -> tuple[PreTrainedModel, int]:
        """Return PEFT's merge_and_unload in float32, and how many modules it merged."""
        adapted = self.adapted or self._load(original=self.original)
        self.adapted = None
        output.refuse_tied(adapted, self.adapter.base)
        return fold_adapter(adapted)

    def write(self, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]) -> int:
        """Write the merged model, each weight rounded once, by save_pretrained; return how many
        modules were merged."""
        plain, modules = self.folded or self._fold()
        self.folded = None
        round_once(plain, dtype)
        self.sums = sum_parameters(plain, dtype)
        plain.config.use_cache = True
        output.end_where_trained(plain, ends)
        plain.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
        return modules

    def check_files(self, folder: Path, dtype: torch.dtype) -> None:
        """Load the model as anybody would. Raise RejectedError where a parameter is not the one
        that was written, or not finite."""
        self.loaded = Base.of_model(str(folder)).load(dtype)
        for name, parameter in self.loaded.named_parameters():
            if not is_finite(parameter.data):
                raise RejectedError(
                    f"{name} of the merged model holds values that are not finite", "train again"
                )
        given = sum_parameters(self.loaded, dtype)
        changed = sorted(name for name, total in self.sums.items() if given.get(name) != total)
        if changed:
            raise RejectedError(
                f"{changed[0]} in the merged model's files is not what was written",
                "check the disk",
            )

    def compute_merged(
        self, folder: Path, dtype: torch.dtype, probes: Sequence[Probe]
    ) -> list[torch.Tensor]:
        """Return logits of the model that was written."""
        loaded = self.loaded or Base.of_model(str(folder)).load(dtype)
        self.loaded = None
        return compute_logits(convert_to_float32(loaded), probes)


def sum_parameters(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Return a checksum of each parameter in `dtype`, as a few modules are loaded in float32
    whatever their files hold, and of the means and variances that a model keeps."""
    numbers = dict(model.named_parameters())
    for path in find_statistics(model):
        kept = model.get_submodule(path).named_buffers()
        numbers |= {f"{path}.{name}": each for name, each in kept if each.is_floating_point()}
    return {
        name: tensors.compute_checksum(number.data.to(dtype)) for name, number in numbers.items()
    }


def say_needed(adapter: Adapter) -> None:
    """Say how much memory a merge of the whole model takes in float32."""
    needed = 4 * adapter.base.build_empty().num_parameters() / 2**30
    free = psutil.virtual_memory().available / 2**30
    ui.say(f"  its weights take {needed:.1f} GiB of memory in float32; {free:.1f} GiB are free")


def fold_adapter(adapted: PeftModel) -> tuple[PreTrainedModel, int]:
    """Return the model after `merge_and_unload`, and how many modules it merged; raise LoraError if
    it left one out."""
    layers = attach.find_lora_layers(adapted)
    try:
        with attach.quiet_peft():
            plain = adapted.merge_and_unload()
    except streaming.REFUSALS as error:
        raise streaming.explain_refusal(error) from error
    left = [name for name, layer in layers.items() if not layer.merged] + list(
        attach.find_lora_layers(plain)
    )
    if left or not layers:
        done = f"{len(layers) - len(left)} of {len(layers)} modules merged"
        raise LoraError(
            f"{done}; left out: {', '.join(left[:3]) or 'none'}",
            "train with other target_modules",
        )
    return plain, len(layers)


def round_once(plain: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round every weight to `dtype`, to nearest even; tied weights stay tied."""
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    plain.config.dtype = dtype
