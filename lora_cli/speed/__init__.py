"""What makes a training step fast, each piece held against the stock way."""

from lora_cli.speed.dora_norms import FactoredDora

__all__ = [
    "FactoredDora",
    "document_attention",
    "dora_norms",
    "install",
    "loss_head",
    "step_packing",
]
