"""Keep the blocks of a base in the host's memory until several processes shard it: each block is on
the GPU only while it computes.

What chooses by a base or tries it before it is sharded (packing, attention, the loss head) wants it
on the GPU, where the whole of it may not fit. So what is outside of the blocks is put there, the
embeddings foremost, by which a model says where it is; and a block's weights go there as it is
called, and are dropped after it. FSDP2 then moves one block at a time and keeps this process's part
of it; DeepSpeed moves one tensor at a time. On the host, weights that have the type of their files
are these files, mapped: processes of one machine share that memory.

Without gradients: the backward pass would want the blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lora_cli.models import quantised
from lora_cli.recipe import Recipe, find_initialisation

UNREAD_STARTS = (None, "gaussian", "orthogonal")
"""What an adapter starts from without the base's weights or gradients, which would be computed with
on the host, or kept on the GPU."""
_visits: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


def find_blocks(network: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model, which stand in lists, that it is sharded by; some models have
    their embeddings sharded by themselves as well."""
    kinds = network._no_split_modules or ()
    lists = [each for each in network.modules() if isinstance(each, nn.ModuleList)]
    return [each for some in lists for each in some if type(each).__name__ in kinds]


def measure_outside(network: PreTrainedModel) -> int:
    """Return the bytes of a model's weights that are in no block, of which each counts once."""
    return sum(each.nbytes for each in _walk_outside(network))


def suit(recipe: Recipe, network: PreTrainedModel) -> bool:
    """Return whether the blocks of a recipe's base, which may be without weights, can wait on the
    host: not those that are quantised, which is done on the GPU, nor those that are looked into
    before they are sharded; and a model has to say by what is outside of them where it is."""
    start = find_initialisation(recipe.lora.init_lora_weights)
    if recipe.quantized or quantised.find_quantised(network.config) is not None:
        return False
    if (start.name if start else None) not in UNREAD_STARTS:
        return False
    first = next(network.parameters())
    return bool(find_blocks(network)) and any(each is first for each in _walk_outside(network))


def _walk_outside(network: PreTrainedModel) -> Iterator[nn.Parameter]:
    inside = {id(each) for block in find_blocks(network) for each in block.parameters()}
    return (each for each in network.parameters() if id(each) not in inside)


@torch.no_grad()
def keep(network: PreTrainedModel, device: torch.device) -> None:
    """Put what is outside of a model's blocks on a device, and let these visit it, until `release`.
    On the host itself all of it stays as it is."""
    for tensor in (*_walk_outside(network), *network.buffers()):
        tensor.data = tensor.data.to(device)
    handles = _visits.setdefault(network, [])
    for block in find_blocks(network):
        visit = _Visit(device)
        handles.append(block.register_forward_pre_hook(visit.begin, prepend=True))
        handles.append(block.register_forward_hook(visit.end, always_call=True))


def release(network: nn.Module) -> None:
    """Let the blocks of a model be where they are from now on, as it is about to be sharded."""
    for handle in _visits.pop(network, []):
        handle.remove()


class _Visit:
    """A block's stay on a device while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.home: list[tuple[Tensor, Tensor]] = []

    def begin(self, block: nn.Module, *_: Any) -> None:
        self.home = [(tensor, tensor.data) for tensor in block.parameters()]
        for tensor, there in self.home:
            tensor.data = there.to(self.device)

    def end(self, *_: Any) -> None:
        for tensor, there in self.home:
            tensor.data = there
        self.home = []
