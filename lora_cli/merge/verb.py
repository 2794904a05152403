"""`lora merge`: an adapter and its base become one plain model."""

from __future__ import annotations

import time
from pathlib import Path

from lora_cli.common import files, ui
from lora_cli.common.errors import RejectedError, UsageError
from lora_cli.merge import merge as fold
from lora_cli.models import adapter_folder as record


def merge(
    adapter_folder: Path, out: Path, base: str | None = None, stream: bool | None = None, original: bool = False
) -> None:
    """Fold the adapter into its base (`base` overrides the one it names), write `out`, and verify it.

    `stream` and `original` as `fold.merge` takes them; a model that fails is left in OUT.rejected.
    """
    started = time.monotonic()
    files.refuse_occupied(out)
    adapter = record.read_adapter(adapter_folder, base)
    made = "" if adapter.record else " (no record: made elsewhere, so its base is taken as the adapter names it)"
    ui.say(f"merging {adapter.folder} into {adapter.base}{made}")
    if original and not adapter.quantization:
        raise UsageError(f"{adapter.folder} was not trained on 4-bit weights", "leave --base-weights out")
    if adapter.quantization:
        into = "original weights" if original else "dequantised base, the function that was trained"
        ui.say(f"  trained on 4-bit weights: merging into the {into}")
    rejected = out.with_name(f"{out.name}.rejected")
    try:
        merged = fold.merge(adapter, out, stream, original, rejected)
    except RejectedError as error:
        raise RejectedError(f"{error.message}; left in {rejected}", error.hint) from error
    ui.say(f"{out}: {str(merged.dtype).removeprefix('torch.')} model, {ui.duration(time.monotonic() - started)}")
