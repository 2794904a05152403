"""Shard the frozen weights over the processes that train together, by FSDP2 through accelerate;
`zero3.py` does it by DeepSpeed.

Each holds a part, and gathers a decoder layer when it computes it. What is trained is small, and
whole wherever it is written: checkpoints and adapters are those of one process, so that any number
of processes goes on from them, sharded or not. On a processor accelerate would take DDP in silence;
its own FSDP2 runs there as well once its state says so, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_cli.distributed import ranks
from lora_cli.models import attach
from lora_cli.recipe import Recipe
from lora_cli.train import zero3


def find_sharding(recipe: Recipe) -> Literal["fsdp", "deepspeed-zero3"] | None:
    """Return by what each of several processes holds a part of the base; None where each has it
    whole."""
    strategy = recipe.distributed.strategy
    if ranks.count() > 1 and (strategy == "fsdp" or strategy == "deepspeed-zero3"):
        return strategy
    return None


def turn_on(trainer: Any, network: PeftModel, replicas: int) -> None:
    """Let a trainer's accelerator, which has just been made, shard the network by decoder layer,
    each of its `replicas` over neighbouring processes."""
    layers = network.get_base_model()._no_split_modules
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(layers),
        state_dict_type="FULL_STATE_DICT",
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if replicas > 1:
        mesh = ParallelismConfig(
            dp_replicate_size=replicas, dp_shard_size=ranks.count() // replicas
        )
        AcceleratorState._shared_state["parallelism_config"] = mesh
        AcceleratorState._shared_state["device_mesh"] = mesh.get_device_mesh(network.device.type)
    trainer.is_fsdp_enabled = True


def is_on(network: torch.nn.Module) -> bool:
    """Return whether a network's weights are sharded."""
    return any(
        isinstance(tensor, DTensor) or zero3.is_sharded(tensor) for tensor in network.parameters()
    )


def describe(network: torch.nn.Module) -> str:
    """Return in words how much of a sharded network this process holds."""
    own, whole = (each / 1e6 for each in measure(network))
    return f"each process holds {own:,.1f} of {whole:,.1f} MB"


def measure(network: torch.nn.Module) -> tuple[int, int]:
    """Return how many bytes of a network this process holds, and how many there are."""
    own, whole = zip(*map(_measure, network.parameters()))
    return sum(own), sum(whole)


def _measure(tensor: Tensor) -> tuple[int, int]:
    if zero3.is_sharded(tensor):
        return zero3.measure_bytes(tensor)
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.nbytes, tensor.nbytes


def gather(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, as `like` is sharded."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def gather_trained(network: PeftModel) -> dict[str, Tensor]:
    """Return what is trained of a network, whole, by its names, on all processes."""
    return {name: gather(tensor.detach()).cpu() for name, tensor in attach.walk_trainable(network)}


@torch.no_grad()
def load_adapter(network: PeftModel, folder: Path) -> None:
    """Put a saved adapter into a sharded network; LoraError where it does not fit."""
    attach.refuse_unfit(network, folder)
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    for name, tensor in state.items():
        tensor.copy_(spread(saved[name].to(tensor.dtype), tensor))


@contextmanager
def whole_optimizer(trainer: Any) -> Iterator[None]:
    """Let a trainer save and load its optimiser's state inside as if nothing were sharded: the
    state is whole, and its file that of one process."""
    if trainer.options.sharded != "fsdp":
        yield
        return
    optimizer = trainer.optimizer
    save, load = optimizer.state_dict, optimizer.load_state_dict
    whole = _map_state(save(), lambda _, value: gather(value))  # on all processes
    tensors = [each for group in optimizer.param_groups for each in group["params"]]

    def load_whole(state: dict[str, Any]) -> None:
        # the number of its steps is nobody's part
        load(
            _map_state(
                state, lambda at, value: spread(value, tensors[at]) if value.dim() else value
            )
        )

    trainer.is_fsdp_enabled = False
    optimizer.state_dict, optimizer.load_state_dict = lambda: whole, load_whole
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = True
        del optimizer.state_dict, optimizer.load_state_dict


def _map_state(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimiser's state with each tensor changed, by the number of what it is of."""
    changed = {
        number: {name: change(number, value) for name, value in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": changed}
