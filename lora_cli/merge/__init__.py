"""Merging an adapter into its base, making one adapter from others, and checking what was written.

Its doors, in the order a reader needs them:

    merge              an adapter and its base become a plain model, compared with what it came from
    combine            several adapters of one base become one
    extract            a LoRA from a fine-tuned model; `convert`: from a DoRA or a larger LoRA
    compare_weights    a merged model's files against its adapter, weight by weight
    rounding           what rounding did to a merged model, told from other settings
    layerwise_logits   logits of a model that need not fit into memory
"""

__all__ = [
    "combine",
    "compare_weights",
    "extract",
    "layerwise_logits",
    "merge",
    "rounding",
]
