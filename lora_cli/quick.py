"""All that makes a training step of a model quicker and leaves its numbers what they are, within rounding."""

from __future__ import annotations

from peft import PeftModel

from lora_cli import dora, dropout, fused, norms


def install(adapted: PeftModel, device: str) -> None:
    """For a model that trains on `device`, as torch names its kind."""
    if device == "cpu":
        norms.install(adapted)
        dropout.install(adapted)
        fused.install(adapted)
    dora.install(adapted)  # last: it remembers what the base's weights are
