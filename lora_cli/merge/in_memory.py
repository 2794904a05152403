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
    is_finite,
    split_rows,
)

SHARD_SIZE = "5GB"


class Whole:
    """The way to merge with the whole model in memory."""

    def __init__(self, adapter: Adapter, original: bool) -> None:
        self.adapter, self.original = adapter, original
        # 4-bit weights answer in the type of training
        self.arithmetic = (
            adapter.trained_dtype if adapter.quantization and not original else torch.float32
        )
        self.adapted: PeftModel | None = None

    def compute_expected(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """Return logits of base with adapter, on the weights that are merged into; both stay in
        memory for `write`."""
        self.adapted = self._load(original=self.original)
        return compute_logits(self.adapted, probes)

    def compute_on_other_weights(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """Return the same on the other weights of an adapter trained in 4 bits."""
        return compute_logits(self._load(original=not self.original), probes)

    def _load(self, original: bool) -> PeftModel:
        """Return base with adapter, in float32 unless its weights are in 4 bits."""
        if self.adapter.quantization and not original:
            return attach.load_adapter(self.adapter.load_base(), self.adapter.folder)
        base = convert_to_float32(self.adapter.load_plain_base(original))
        return attach.load_adapter(base, self.adapter.folder)

    def write(self, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]) -> int:
        """Write PEFT's merge_and_unload, each weight rounded once, by save_pretrained; return how
        many modules were merged."""
        adapted = self.adapted or self._load(original=self.original)
        self.adapted = None
        if self.adapter.quantization and not self.original:
            adapted = attach.load_adapter(
                convert_to_float32(adapted.unload().dequantize()), self.adapter.folder
            )
        output.refuse_tied(adapted, self.adapter.base)
        plain, modules = fold_adapter(adapted)
        round_once(plain, dtype)
        plain.config.use_cache = True
        output.end_where_trained(plain, ends)
        plain.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
        return modules

    def check_files(self, folder: Path) -> None:
        """Raise RejectedError where a value is not finite; every value is checked."""
        tensors = Base(str(folder)).tensors
        assert tensors is not None, "save_pretrained writes safetensors"
        for name, entry in tensors.entries.items():
            if not all(is_finite(tensors.rows(name, *block)) for block in split_rows(entry.shape)):
                raise RejectedError(
                    f"{name} of the merged model holds values that are not finite", "train again"
                )

    def compute_merged(
        self, folder: Path, dtype: torch.dtype, probes: Sequence[Probe]
    ) -> list[torch.Tensor]:
        """Return logits of the model that was written, loaded as anybody would load it."""
        return compute_logits(convert_to_float32(Base(str(folder)).load(dtype)), probes)


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
