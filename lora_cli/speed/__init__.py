"""Ways to make a training step fast, each tried against the stock way before it is used.

Its doors, in the order a reader needs them:

    install               all that makes a layer quicker, put into a model; compiling
    loss_head             logits and loss only at tokens with a label
    step_packing          the rows of one optimiser step share sequences, without padding
    document_attention    documents in one sequence, each attending by itself on a CPU
    dora_norms            DoRA's norms without the full product, once per step
    FactoredDora          … of one layer
"""

from lora_cli.speed.dora_norms import FactoredDora

__all__ = [
    "FactoredDora",
    "document_attention",
    "dora_norms",
    "install",
    "loss_head",
    "step_packing",
]
