"""What a model of pictures settles beside its head: which of its modules `all-linear` means, and
whether any can be stored in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_cli.common import UsageError
from lora_cli.models import find_convolutions, has_linear, shorten_names
from lora_cli.plan.auto_choices import Choice
from lora_cli.recipe import Recipe

ALL_LINEAR = "all-linear"


def settle_targets(
    recipe: Recipe, network: nn.Module, head: Sequence[str], choices: list[Choice]
) -> dict[str, object]:
    """Return the keys of `lora` that change for a base without linear modules but its `head`, whose
    convolutions are adapted then; add the choice made to `choices`.

    Raises UsageError where there is nothing to adapt, or to store in 4 bits.
    """
    if has_linear(network, head):
        return {}
    kind = recipe.model.name_or_path
    if recipe.quantized:
        plain = {"qlora": "lora", "qdora": "dora"}[recipe.method]
        raise UsageError(
            f"{recipe.where('method')}: {recipe.method} stores linear weights in 4 bits, and "
            f"{kind} has none but its head: bitsandbytes does not store convolutions so",
            f"--set method={plain}",
        )
    if recipe.lora.target_modules != ALL_LINEAR:
        return {}
    usable, others = find_convolutions(network, head)
    if not usable:
        found = ", ".join(f"{len(names)} are {why}" for why, names in others.items())
        raise UsageError(
            f"{recipe.where('lora', 'target_modules')}: {kind} has no linear module but its head, "
            f"and no convolution that PEFT adapts ({found or 'it has none'})",
            "take a base of another family",
        )
    targets = shorten_names(network, usable)
    left = "".join(f", without {len(names)} that are {why}" for why, names in others.items())
    reason = f"{ALL_LINEAR}: its {len(usable)} convolutions{left}; but its head nothing is linear"
    choices.append(Choice("lora.target_modules", targets, reason))
    return {"target_modules": targets}
