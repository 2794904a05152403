"""`lora merge`: an adapter and its base become one plain model."""

from __future__ import annotations

import time
from pathlib import Path

from lora_cli import fold, record, ui


def merge(adapter_folder: Path, out: Path, base: str | None = None) -> None:
    """Fold the adapter into its base (`base` overrides the one it names), write `out`, and verify it."""
    started = time.monotonic()
    adapter = record.read_adapter(adapter_folder, base)
    made = "" if adapter.record else " (no record: made elsewhere, so its base is taken as the adapter names it)"
    ui.say(f"merging {adapter.folder} into {adapter.base}{made}")
    if adapter.quantization:
        ui.say("  trained on 4-bit weights: merging into the dequantised base, the function that was trained")
    merged = fold.merge(adapter, out)
    ui.say(f"{out}: {str(merged.dtype).removeprefix('torch.')} model, {ui.duration(time.monotonic() - started)}")
