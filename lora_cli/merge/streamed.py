"""Merge in constant memory, tensor by tensor, and check the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli.common import RejectedError, ui
from lora_cli.merge import in_memory, layerwise_logits, output, streaming, streaming_plan
from lora_cli.models import Adapter, Base, Probe, tensors

# A merge says so if a single tensor takes more MiB than this
LARGE = 500


class Streamed:
    """The way to merge in constant memory."""

    is_repeatable = True
    """Whether merging a tensor again gives the same bits."""

    def __init__(self, adapter: Adapter, trained: torch.dtype, original: bool) -> None:
        """Plan the merge; raise streaming_plan.Unstreamable where it is not possible."""
        self.adapter, self.trained, self.original = adapter, trained, original
        self.plan, self.adapted = streaming_plan.make_plan(
            adapter, trained, None if original else adapter.quantization
        )
        output.refuse_tied(self.adapted, adapter.base)
        self.sums: dict[str, int] = {}

    def compute_expected(self, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
        """Return logits of base with adapter, on the weights that are merged into, or None where
        they cannot be computed."""
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_logits(self.adapted, self.plan.read, self.plan, probes),
            lambda: in_memory.Whole(self.adapter, self.original).compute_expected(probes),
            self.plan.weights.base,
            self.adapter.base.task,
        )

    def compute_on_other_weights(self, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
        """Return the same on the other weights of an adapter trained in 4 bits: original for
        dequantised, and the reverse."""
        plan, adapted = streaming_plan.make_plan(
            self.adapter, self.trained, self.adapter.quantization if self.original else None
        )
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_logits(adapted, plan.read, plan, probes),
            lambda: in_memory.Whole(self.adapter, self.original).compute_on_other_weights(probes),
            plan.weights.base,
            self.adapter.base.task,
        )

    def compute_unrounded(self, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
        """Return logits of the merged model before its weights are rounded, or None where they
        cannot be computed."""
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_unrounded(self.plan, self.adapter.base, probes),
            lambda: in_memory.Whole(self.adapter, self.original).compute_unrounded(probes),
            self.plan.weights.base,
            self.adapter.base.task,
        )

    def compute_rounded(
        self, probes: Sequence[Probe], dtype: torch.dtype
    ) -> list[torch.Tensor] | None:
        """Return the same with each weight rounded once to `dtype`."""
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_unrounded(self.plan, self.adapter.base, probes, dtype),
            lambda: in_memory.Whole(self.adapter, self.original).compute_rounded(probes, dtype),
            self.plan.weights.base,
            self.adapter.base.task,
        )

    def write(self, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]) -> int:
        """Write the base's files again, merged tensor by tensor; return how many modules were
        merged.

        The model's answers end in `ends`.
        """
        needed = self.plan.measure_largest_whole() / 2**20
        if needed > LARGE:
            ui.say(
                f"  some tensors are merged whole, for which up to {needed:.0f} MiB are needed each"
            )
        modules, self.sums = streaming.write(self.plan, folder, dtype)
        output.write_config(self.adapter, folder, dtype, ends)
        return modules

    def check_files(self, folder: Path, dtype: torch.dtype) -> None:
        """Raise RejectedError where the files hold something else than was written. Writing has
        checked that all of it is finite."""
        changed = tensors.find_changed(folder, self.sums)
        if changed:
            raise RejectedError(
                f"{changed} in the merged model's files is not what was written", "check the disk"
            )

    def compute_merged(
        self, folder: Path, dtype: torch.dtype, probes: Sequence[Probe]
    ) -> list[torch.Tensor] | None:
        """Return logits of the model that was written, or None where they cannot be computed."""
        return layerwise_logits.walk_logits_of(Base.of_model(str(folder)), dtype, probes)
