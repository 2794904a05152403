"""PEFT's rules for which module or parameter a name in LoraConfig means, in one place.

Where PEFT has a function for a rule it is called; the others are restated here, each with the place
in PEFT 0.21 that it restates, and tests/models/test_peft_matching.py asks PEFT the same questions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn
from transformers import PreTrainedModel

NAMING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "layers_pattern",
    "layers_to_transform",
)
"""The fields that say which modules, layers and parameters are meant."""


def matches_ending(name: str, ending: str) -> bool:
    """Return whether an item of a list of targets means this module or parameter: its whole name,
    or its last parts.

    tuners/tuners_utils.py, check_target_module_exists and BaseTuner._inject_parameters.
    """
    return name == ending or name.endswith(f".{ending}")


def is_saved_whole(name: str, saved: str) -> bool:
    """Return whether an item of `modules_to_save` means this module: unlike elsewhere, an ending
    may begin in the middle of a part of the name.

    utils/other.py, _set_trainable.
    """
    return name.endswith(saved)


def matches_key(name: str, key: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` means this module.

    utils/other.py, get_pattern_key.
    """
    return re.match(make_key_pattern(key), name) is not None


def make_key_pattern(key: str) -> str:
    """Make the regular expression of a key of `rank_pattern` or `alpha_pattern` (the same
    place)."""
    return rf"(.*\.)?({key})$"


def walk_patterns(config: LoraConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (field, what was written, regular expression) for every expression that PEFT makes of
    `config`.

    utils/other.py, match_target_against_key and get_pattern_key; tuners/tuners_utils.py,
    check_target_module_exists.
    """
    for field in ("target_modules", "exclude_modules"):
        written = getattr(config, field)
        if isinstance(written, str) and written != "all-linear":
            yield field, written, f"(?:{written})\\Z"
    for field in ("rank_pattern", "alpha_pattern"):
        for written in getattr(config, field) or {}:
            yield field, written, make_key_pattern(written)
    for written in config.modules_to_save or []:
        yield "modules_to_save", written, rf"(^|.*\.){written}($|\..*)"
    for written in as_list(config.layers_pattern):
        yield "layers_pattern", written, rf"(?:^|.*?\.){written}\.(?P<idx>\d+)\."


def as_list(value: Any) -> list[Any]:
    """Return a field that takes one value or several as a list; empty for anything empty, a mapping
    too, as PEFT takes it."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple, set, dict)) else [value]


def resolve_targets(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """Return a copy of `config` as PEFT will apply it: `all-linear` spelt out, names of older model
    definitions converted."""
    resolved = copy.deepcopy(config)
    convert_peft_config_for_transformers(
        resolved, model=model, conversions=get_model_conversion_mapping(model)
    )
    return _maybe_include_all_linear_layers(resolved, model)


def find_targeted_modules(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Return the modules that PEFT will adapt."""
    return [name for name in names if name and check_target_module_exists(config, name)]


def find_targeted_parameters(config: LoraConfig, model: nn.Module) -> list[str]:
    """Return the parameters that PEFT will adapt through `target_parameters`."""
    wanted = config.target_parameters or []
    names = list_parameter_names(model)
    return [name for name in names if any(matches_ending(name, target) for target in wanted)]


def list_parameter_names(model: nn.Module) -> list[str]:
    """List every name of every parameter, also the second name of a shared one."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]
