"""Choose what `all-linear` means on a model: the linear modules that a text passes through and that
PEFT can adapt.

PEFT takes all of them but the head. That includes the towers for pictures and sound of a base that
is trained on text alone, whose adapters would stay at zero, and modules that PEFT itself refuses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import PreTrainedModel

from lora_cli.models.text_part import find_text_part

ALL_LINEAR = "all-linear"
NOT_TEXT = "which no text passes through"
MORE = "which return more than a product"
REFUSED = "which PEFT does not adapt in a state-space model"


def find_left_out(
    model: PreTrainedModel, config: LoraConfig, targeted: Iterable[str]
) -> dict[str, list[str]]:
    """Return those of the `targeted` modules that `all-linear` leaves out, by the reason; none
    where `config` names its targets."""
    found: dict[str, list[str]] = {}
    if config.target_modules != ALL_LINEAR:
        return found
    text = find_text_part(model)
    for name in targeted:
        if not name.startswith(text):
            found.setdefault(NOT_TEXT, []).append(name)
        elif _is_refused(model, name):
            found.setdefault(REFUSED, []).append(name)
        elif computes_more(model.get_submodule(name)):
            found.setdefault(MORE, []).append(name)
    return found


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    """Return such as `12 modules of vision_tower are for pictures or sound`, empty where nothing is
    left out."""
    said = []
    for reason, names in left_out.items():
        parts = dict.fromkeys(
            _name_part(name) if reason == NOT_TEXT else name.rpartition(".")[2] for name in names
        )
        said.append(f"{len(names)} of {', '.join(parts)}, {reason}")
    return "; ".join(said)


def computes_more(module: nn.Module) -> bool:
    """Whether a linear module of a model's own code returns something else than its product, as
    Llama 4's router, which returns two tensors: an adapter would add to a product. One row is
    tried."""
    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or not isinstance(module, nn.Linear):
        return False
    row = torch.zeros(1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    try:
        with torch.no_grad():
            made = module(row)
    except (RuntimeError, TypeError, IndexError):  # it takes something else than rows
        return True
    return not isinstance(made, torch.Tensor) or made.shape != (1, module.out_features)


def _name_part(name: str) -> str:
    """Return the part of a model that a module belongs to: `vision_tower` of
    `model.vision_tower.layers.0.fc1`."""
    return name.removeprefix("model.").partition(".")[0]


def _is_refused(model: PreTrainedModel, name: str) -> bool:
    """Ask PEFT, by the function that it asks itself before it adapts a module."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False
