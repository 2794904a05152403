"""A base model's configuration and commit."""

from __future__ import annotations

import math
import re
from collections import Counter

import torch
from huggingface_hub import resolve_revision
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from lora_cli.common import library_errors, remote_code
from lora_cli.common.errors import LoraError
from lora_cli.models import adapter_folder, tensors
from lora_cli.recipe.keys import Recipe

BROKEN_CONFIG = "its config.json is damaged, or of another version: copy it again"


def resolve_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's branch, tag or commit stands for now; None for a folder.

    Everything of a run is loaded at this one commit, and merging loads the base at it again. LoraError when `name` is
    neither a model's folder nor a name on the hub; the hub's own errors when it does not know the name or revision.
    """
    if adapter_folder.classify(name) == "model":
        return None
    if adapter_folder.classify(name) != "hub":
        raise LoraError(f"{name} is not a base model", "give a folder with config.json or a name on the hub")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return str(resolve_revision(name, revision=revision).resolved)


def load_recipe_config(recipe: Recipe) -> tuple[str | None, PretrainedConfig]:
    """The commit that a recipe's base stands for now, and its configuration; LoraError naming the key."""
    try:
        commit = resolve_commit(recipe.model.name_or_path, recipe.model.revision)
        return commit, load_config(recipe.model.name_or_path, commit)
    except LoraError as error:
        if not error.message.startswith("model."):
            error.message = f"model.name_or_path: {error.message}"
        raise


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder; where it names no type, with that of the weights."""
    with library_errors.translate_file_errors(f"transformers cannot read the configuration of {name}", BROKEN_CONFIG):
        remote_code.refuse_disallowed_code(name, PretrainedConfig.get_config_dict(name, revision=revision)[0])
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=remote_code.is_allowed())
    if config.dtype is None and (found := tensors.open_model(name, revision)):
        sizes = Counter[torch.dtype]()
        for entry in found.entries.values():
            sizes[entry.dtype] += math.prod(entry.shape) if entry.dtype.is_floating_point else 0
        config.dtype = sizes.most_common(1)[0][0]
    return config


def get_checkpoint_dtype(config: PretrainedConfig) -> torch.dtype:
    """The type the weights have on disk (float32 when the configuration does not say)."""
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
