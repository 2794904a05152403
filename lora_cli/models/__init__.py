"""Base models, adapters, tokenizers, chat templates, targets, initial weights, fingerprints and
probes."""

from lora_cli.models.adapter_folder import Adapter, read_adapter
from lora_cli.models.base import Base, convert_to_float32, refuse_not_finite, to_accelerator
from lora_cli.models.config import get_checkpoint_dtype, num_experts
from lora_cli.models.probes import (
    KL_LIMIT,
    PROBES,
    TRAINED,
    Difference,
    Probe,
    check_trained,
    compare_logits,
    compute_logits,
    make_probes,
    rounding_limit,
    save_trained,
)
from lora_cli.models.tensors import Tensors, is_finite, split_rows
from lora_cli.models.tokenizer import (
    IGNORED,
    adds_bos,
    load_recipe_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

__all__ = [
    "Adapter",
    "Base",
    "Difference",
    "IGNORED",
    "KL_LIMIT",
    "PROBES",
    "Probe",
    "TRAINED",
    "Tensors",
    "adapter_contents",
    "adds_bos",
    "attach",
    "chat_template",
    "check_trained",
    "compare_logits",
    "compute_logits",
    "convert_to_float32",
    "empty",
    "four_bit",
    "get_checkpoint_dtype",
    "init_weights",
    "is_finite",
    "load_recipe_tokenizer",
    "load_tokenizer",
    "make_probes",
    "names",
    "num_experts",
    "read_adapter",
    "refuse_not_finite",
    "rounding_limit",
    "save_tokenizer",
    "save_trained",
    "split_rows",
    "targets",
    "tensors",
    "to_accelerator",
    "token_rows",
]
