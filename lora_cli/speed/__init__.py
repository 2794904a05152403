"""What makes a training step fast, each piece held against the stock way."""

__all__ = [
    "document_attention",
    "dora_norms",
    "install",
    "loss_head",
    "step_packing",
]
