"""Merging in constant memory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli.common import ui
from lora_cli.common.errors import RejectedError
from lora_cli.merge import in_memory as whole
from lora_cli.merge import layerwise_logits as walk
from lora_cli.merge import output
from lora_cli.merge import streaming as stream
from lora_cli.merge import streaming_plan as attach
from lora_cli.models import probes as verify
from lora_cli.models import tensors as shards
from lora_cli.models.adapter_folder import Adapter

# MiB that merging a tensor may take before it is said
LARGE = 500


class Streamed:
    """In constant memory."""

    def __init__(self, adapter: Adapter, trained: torch.dtype, original: bool) -> None:
        """Raises attach.Unstreamable."""
        self.adapter, self.trained, self.original = adapter, trained, original
        self.arithmetic = torch.float32
        self.plan, self.adapted = attach.make(adapter, trained, None if original else adapter.quantization)
        output.refuse_tied(self.adapted, adapter.base)
        self.sums: dict[str, int] = {}

    def expected(self, probes: Sequence[verify.Probe]) -> list[torch.Tensor] | None:
        """Logits of base with adapter, on the weights that are merged into; None where they cannot be had."""
        return walk.or_loaded(
            lambda: walk.logits(self.adapted, self.plan.read, self.plan, probes),
            lambda: whole.Whole(self.adapter, self.original).expected(probes),
            self.plan.weights.base,
        )

    def other(self, probes: Sequence[verify.Probe]) -> list[torch.Tensor] | None:
        """The same on the other weights of an adapter trained in 4 bits: original for dequantised, and so on."""
        plan, adapted = attach.make(self.adapter, self.trained, self.adapter.quantization if self.original else None)
        return walk.or_loaded(
            lambda: walk.logits(adapted, plan.read, plan, probes),
            lambda: whole.Whole(self.adapter, self.original).other(probes),
            plan.weights.base,
        )

    def write(self, folder: Path, dtype: torch.dtype, ends: Sequence[int | None]) -> int:
        """The base's files again, tensor by tensor; returns how many modules were merged. Answers end in `ends`."""
        needed = self.plan.largest_whole() / 2**20
        if needed > LARGE:
            ui.say(f"  some tensors are merged whole, for which up to {needed:.0f} MiB are needed each")
        modules, self.sums = stream.write(self.plan, folder, dtype)
        output.write_config(self.adapter, folder, dtype, ends)
        return modules

    def check_files(self, folder: Path) -> None:
        """RejectedError where they hold something else than was written; that this was finite has been looked at."""
        changed = shards.changed_since(folder, self.sums)
        if changed:
            raise RejectedError(f"{changed} in the merged model's files is not what was written", "check the disk")

    def merged(self, folder: Path, dtype: torch.dtype, probes: Sequence[verify.Probe]) -> list[torch.Tensor] | None:
        """Logits of the model that was written."""
        return walk.logits_of(str(folder), None, dtype, probes)
