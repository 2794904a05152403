"""Merging in constant memory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli.common import RejectedError, ui
from lora_cli.merge import in_memory, layerwise_logits, output, streaming, streaming_plan
from lora_cli.models import Adapter, Base, Probe, tensors

# MiB that merging a tensor may take before it is said
LARGE = 500


class Streamed:
    """In constant memory."""

    def __init__(self, adapter: Adapter, trained: torch.dtype, original: bool) -> None:
        """Raises attach.Unstreamable."""
        self.adapter, self.trained, self.original = adapter, trained, original
        self.arithmetic = torch.float32
        self.plan, self.adapted = streaming_plan.make_plan(
            adapter, trained, None if original else adapter.quantization
        )
        output.refuse_tied(self.adapted, adapter.base)
        self.sums: dict[str, int] = {}

    def expected(self, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
        """Logits of base with adapter, on the weights that are merged into; None where they cannot
        be had."""
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_logits(self.adapted, self.plan.read, self.plan, probes),
            lambda: in_memory.Whole(self.adapter, self.original).expected(probes),
            self.plan.weights.base,
        )

    def other(self, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
        """The same on the other weights of an adapter trained in 4 bits: original for dequantised,
        and so on."""
        plan, adapted = streaming_plan.make_plan(
            self.adapter, self.trained, self.adapter.quantization if self.original else None
        )
        return layerwise_logits.walk_or_load(
            lambda: layerwise_logits.walk_logits(adapted, plan.read, plan, probes),
            lambda: in_memory.Whole(self.adapter, self.original).other(probes),
            plan.weights.base,
        )

    def write(self, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]) -> int:
        """The base's files again, tensor by tensor; returns how many modules were merged. Answers
        end in `ends`."""
        needed = self.plan.largest_whole() / 2**20
        if needed > LARGE:
            ui.say(
                f"  some tensors are merged whole, for which up to {needed:.0f} MiB are needed each"
            )
        modules, self.sums = streaming.write(self.plan, folder, dtype)
        output.write_config(self.adapter, folder, dtype, ends)
        return modules

    def check_files(self, folder: Path) -> None:
        """RejectedError where they hold something else than was written; that this was finite has
        been looked at."""
        changed = tensors.find_changed(folder, self.sums)
        if changed:
            raise RejectedError(
                f"{changed} in the merged model's files is not what was written", "check the disk"
            )

    def merged(
        self, folder: Path, dtype: torch.dtype, probes: Sequence[Probe]
    ) -> list[torch.Tensor] | None:
        """Logits of the model that was written."""
        return layerwise_logits.walk_logits_of(Base(str(folder)), dtype, probes)
