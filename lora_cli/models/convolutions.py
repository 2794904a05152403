"""Find what a model of convolutions has to adapt, where `all-linear` finds its head alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.models.unsupported import explain_unlike_peft

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def has_linear(network: nn.Module, head: Iterable[str]) -> bool:
    """Return whether a model has a linear module outside of its `head`."""
    return any(
        isinstance(module, (nn.Linear, Conv1D))
        for path, module in network.named_modules()
        if not _is_inside(path, head)
    )


def find_convolutions(
    network: nn.Module, head: Iterable[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the convolutions outside of the `head` that PEFT adapts, and the others by the reason
    why it does not."""
    usable, others = list[str](), dict[str, list[str]]()
    for path, module in network.named_modules():
        if isinstance(module, CONVOLUTIONS) and not _is_inside(path, head):
            why = explain_unlike_peft(module)
            if why is None:
                usable.append(path)
            else:
                others.setdefault(why.partition("=")[0], []).append(path)
    return usable, others


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
