"""Tell what rounding did to a merged model from other settings: its `config.json` has to be its
base's, field by field, and its logits those of its weights by the base's configuration.

In 16 bits a distance from base with adapter does not tell the two: rounding alone moved
SmolLM2-135M by a mean KL of 0.026, and ten times its base of rotary frequencies by 0.031.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from lora_cli.common import RejectedError
from lora_cli.merge import layerwise_logits
from lora_cli.models import (
    Adapter,
    Base,
    Probe,
    attach,
    choose_limit,
    compare_logits,
    num_experts,
    num_layers,
    quantised,
    read_field,
)

ROUTED_KL = 1e-4
"""The mean KL up to which a merged model of experts counts as the right one although single tokens
went to another expert."""
OWN = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|(id2label|label2id|problem_type)|quantization_config"
    r"|transformers_version|use_cache|vocab_size|.*_token_ids?|.*drop(out)?(_.*)?|initializer_.*"
    r"|output_.*|return_dict|.*loss_coef|pretraining_tp"
)
"""Fields that a merge changes, or that name what a model is, or how it is trained, and not what it
computes. The size of the vocabulary shows in the weights."""


def refuse_other_settings(adapter: Adapter, merged: Base) -> None:
    """Raise RejectedError naming the first field of a merged model's configuration that is not its
    base's. What only one of the two has is left out: their class does not know it, or it would have
    filled it in."""
    # classes such as BART's, of its decoder alone, change what they are given
    base = adapter.base.build_unweighted(_make_base_config(adapter, merged)).config
    given_config = merged.build_unweighted().config
    for field, wanted, given in _list_differences(base.to_dict(), given_config.to_dict()):
        raise RejectedError(
            f"{field} is {_spell(given)} in config.json of {merged}, and {_spell(wanted)} in that "
            f"of its base {adapter.base}",
            "merge again, or set it back in config.json",
        )


def _spell(value: Any) -> str:
    return "not set" if value is None else str(value)[:80]


def _list_differences(
    base: Mapping[str, Any], merged: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field that both have, by its path, with its two values where they differ."""
    for field in sorted(base.keys() & merged.keys()):
        wanted, given = base[field], merged[field]
        if wanted == given or OWN.fullmatch(field):
            continue
        if isinstance(wanted, dict) and isinstance(given, dict):
            if "model_type" in wanted:  # a part's configuration, whose class knows its fields
                both = _list_differences(wanted, given)
            else:
                both = _list_in_table(wanted, given)
            yield from ((f"{field}.{inner}", *values) for inner, *values in both)
        else:
            yield field, wanted, given


def _list_in_table(
    base: Mapping[str, Any], merged: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the same of a table such as rope_parameters, where what one lacks counts as well."""
    for key in sorted({*base, *merged}, key=str):
        if base.get(key) != merged.get(key):
            yield str(key), base.get(key), merged.get(key)


def refuse_other_function(
    adapter: Adapter, merged: Base, given: Sequence[torch.Tensor], probes: Sequence[Probe]
) -> None:
    """Raise RejectedError where `given`, the logits of a merged model, are not those of its own
    weights by its base's configuration. Weights and arithmetic are the same, in float32, so that
    only the order of sums may differ. Nothing is said where they cannot be computed."""
    config = _make_base_config(adapter, merged)
    by_base = layerwise_logits.walk_logits_of(merged, merged.dtype, probes, config)
    if by_base is None:
        return
    task = adapter.base.task
    difference = compare_logits(by_base, layerwise_logits.keep_last(task, given))
    limit = choose_limit(difference, torch.float32, num_layers(adapter.base.config))
    routed = num_experts(adapter.base.config) and difference.mean_kl <= ROUTED_KL
    if not limit.kept and not routed:
        raise RejectedError(
            f"config.json of {merged} makes another function of its weights than that of its base "
            f"{adapter.base}: {difference} ({limit})",
            "merge again, or diff the two",
        )


def _make_base_config(adapter: Adapter, merged: Base) -> PretrainedConfig:
    """Return the configuration of the base for the weights of `merged`: these may have more tokens,
    and a head of their own where the base ties it: the files of some have another one than their
    embeddings, and whole modules of an adapter are one. That weight is compared as all are."""
    config = quantised.without_quantisation(adapter.base.config)
    tied = read_field(merged.config, "tie_word_embeddings")
    whole = attach.read_adapter_config(adapter.folder).modules_to_save
    if tied is False or (tied is not None and whole):
        config.tie_word_embeddings = tied
    size = read_field(merged.config.get_text_config(), "vocab_size")
    if size is not None:  # which pictures have none of
        config.get_text_config().vocab_size = size
    return config
