"""Merging, combining, extracting and converting adapters, and the comparison of weights."""

__all__ = [
    "combine",
    "compare_weights",
    "extract",
    "layerwise_logits",
    "merge",
]
