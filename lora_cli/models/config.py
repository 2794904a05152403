"""Load the configuration of a model, on the hub or in a folder."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from lora_cli.common import LoraError, library_errors, remote_code
from lora_cli.models import names, settings, tensors
from lora_cli.recipe import ProblemType

BROKEN_CONFIG = "its config.json is damaged, or of another version: copy it again"


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """Load the configuration of a model on the hub or in a folder; where it does not name a type,
    take that of the weights."""
    with (
        names.explain_hub_failure(name),
        library_errors.translate_file_errors(
            f"transformers cannot read the configuration of {name}", BROKEN_CONFIG
        ),
    ):
        settings.read_settings(name, revision, "config.json")
        written = PretrainedConfig.get_config_dict(name, revision=revision)[0]
        remote_code.refuse_disallowed_code(name, written)
        refuse_impossible(f"{name}/config.json", written)
        _refuse_serving_attention(name, written)
        _refuse_odd_fields(name, written)
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=remote_code.is_allowed()
        )
    try:
        config.get_text_config()
    except ValueError as error:  # such as MusicGen, which reads with one and writes sound
        raise LoraError(
            f"{name} has several text models, of which none writes text",
            "give a causal language model",
        ) from error
    if config.dtype is None and (found := tensors.open_model(name, revision)):
        sizes = Counter[torch.dtype]()
        for entry in found.entries.values():
            sizes[entry.dtype] += math.prod(entry.shape) if entry.dtype.is_floating_point else 0
        config.dtype = sizes.most_common(1)[0][0]
    return config


MOST = (
    (r"layers?|blocks", 2_000),
    (r"experts|heads?|groups|stages|labels", 100_000),
    (r"token_id", 2**27),
    (r"size|dim|rank|positions|position_embeddings|length|window|kernel|width|inner", 2**27),
)
"""The largest number of a field whose name ends so, several times that of any known model (126
layers, 16,384 experts): it says how much is built, before a weight is read."""


POSITIVE = ("vocab_size", "max_position_embeddings", "num_labels", "hidden_size")
"""What no model has none of."""


def refuse_impossible(file: str, written: Mapping[str, Any], where: str = "") -> None:
    """Raise LoraError for a number in a configuration, read from `file`, that no model can have."""
    for key, value in written.items():
        if isinstance(value, dict):
            refuse_impossible(file, value, f"{where}{key}.")
        most = next(
            (most for ends, most in MOST if re.search(rf"(^|_)n?({ends})$", str(key))), None
        )
        if key in POSITIVE and isinstance(value, (int, float)) and value < 1:
            raise LoraError(f"{file}: {where}{key} is {value}", "copy it again")
        if most and isinstance(value, (int, float)) and value > most:
            raise LoraError(
                f"{file}: {where}{key} is {value:,}, and at most {most:,} is read",
                "copy it again",
            )


def _refuse_serving_attention(name: str, written: Mapping[str, Any]) -> None:
    """Raise LoraError for attention that transformers has for its server alone."""
    for key in ("attn_implementation", "_attn_implementation"):
        if "|" in str(written.get(key) or ""):
            raise LoraError(
                f"{name}/config.json: {key} is {written[key]}, which is for a server",
                "remove it from config.json",
            )


def _refuse_odd_fields(name: str, written: Mapping[str, Any]) -> None:
    """Raise LoraError for fields that transformers takes as they are, and that say nothing."""
    classes, problem = written.get("architectures"), written.get("problem_type")
    odd = None
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    ):
        odd = "architectures is not a list of names of classes"
    elif problem is not None and problem not in get_args(ProblemType):
        odd = f"problem_type is none of {', '.join(get_args(ProblemType))}"
    if odd:
        raise LoraError(f"{name}/config.json: {odd}", "copy it again")


def read_field(config: PretrainedConfig, name: str) -> Any:
    """Return a field of a configuration; None where it has none, or another for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return None


def num_experts(config: PretrainedConfig) -> int:
    """Return how many experts a layer of the base's text model chooses among; 0 where it has
    none."""
    text = config.get_text_config()
    fields = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((found for name in fields if (found := getattr(text, name, None))), 0)


def num_layers(config: PretrainedConfig) -> int:
    """Return how many layers the base's text model has; 1 where the configuration does not say."""
    text = config.get_text_config()
    fields = ("num_hidden_layers", "num_layers", "num_blocks")
    return next((found for name in fields if (found := getattr(text, name, None))), 1)


def num_active_experts(config: PretrainedConfig) -> int:
    """Return how many experts of a layer work on a token; all of them where the configuration does
    not say."""
    text = config.get_text_config()
    fields = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    found = (getattr(text, name, None) for name in fields)
    return next((number for number in found if isinstance(number, int)), num_experts(config))


def get_checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the type the weights have on disk (float32 when the configuration does not say).

    float32 for float64 as well: nothing here, and no engine, computes in more.
    """
    known = isinstance(config.dtype, torch.dtype) and config.dtype != torch.float64
    return config.dtype if known else torch.float32
