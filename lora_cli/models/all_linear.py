"""Choose what `all-linear` means on a model: the linear modules that a text passes through and that
PEFT can adapt.

PEFT takes all of them but the head. That includes the towers for pictures and sound of a base that
is trained on text alone, whose adapters would stay at zero, and modules that PEFT itself refuses.
"""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from transformers import PreTrainedModel

from lora_cli.models.text_part import find_text_part

ALL_LINEAR = "all-linear"
NOT_TEXT = "which no text passes through"
REFUSED = "which PEFT does not adapt in a state-space model"


def find_left_out(
    model: PreTrainedModel, config: LoraConfig, resolved: LoraConfig
) -> dict[str, list[str]]:
    """Return the modules that `all-linear` leaves out, by the reason; none where `config` names its
    targets. `resolved` is that configuration with the targets spelt out, as PEFT does it."""
    found: dict[str, list[str]] = {}
    if config.target_modules != ALL_LINEAR:
        return found
    text = find_text_part(model)
    for name in sorted(resolved.target_modules):
        if not name.startswith(text):
            found.setdefault(NOT_TEXT, []).append(name)
        elif _is_refused(model, name):
            found.setdefault(REFUSED, []).append(name)
    return found


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    """Return such as `12 modules of vision_tower are for pictures or sound`, empty where nothing is
    left out."""
    said = []
    for reason, names in left_out.items():
        parts = dict.fromkeys(
            name.rpartition(".")[2] if reason == REFUSED else _name_part(name) for name in names
        )
        said.append(f"{len(names)} of {', '.join(parts)}, {reason}")
    return "; ".join(said)


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
