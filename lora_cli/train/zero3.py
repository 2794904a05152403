"""Shard the frozen weights over the processes that train together, by DeepSpeed's ZeRO-3.

DeepSpeed cuts each weight into a part for each process, and its hooks gather a module's weights
before that module computes. What is trained stays whole in each process, beside what DDP needs for
it: its gradients are summed by DDP and its optimiser is torch's own, so that a step is refused,
clipped and saved as in any other run. DeepSpeed's own engine would divide these as well, which for
an adapter saves next to nothing, and would update weights amid the backward pass.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from peft import PeftModel
from torch import Tensor, nn

from lora_cli.common import UsageError
from lora_cli.distributed import ranks
from lora_cli.models import attach
from lora_cli.recipe import Recipe

VERSIONS = SpecifierSet(">=0.19.8,<0.20")
"""Of DeepSpeed, whose hooks are no promise of its own; pyproject.toml says it, too."""


def refuse_absence(recipe: Recipe) -> None:
    """Raise UsageError where DeepSpeed is not installed, or another one."""
    place = recipe.where("distributed", "strategy")
    hint = "pip install 'lora-cli[deepspeed]', or distributed: {strategy: fsdp}"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UsageError(f"{place} needs DeepSpeed, which is not installed", hint) from None
    if version not in VERSIONS:
        raise UsageError(f"{place} needs DeepSpeed {VERSIONS}, and here is {version}", hint)


def refuse_experts(recipe: Recipe, network: nn.Module) -> None:
    """Raise UsageError for a network whose experts are modules of their own, as in some bases by
    remote code: a process none of whose tokens reach one does not come to gather it."""
    for place, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and place.endswith("experts"):
            message = f"ZeRO-3 cannot gather {place}: not all processes' tokens reach each expert"
            where = recipe.where("distributed", "strategy")
            raise UsageError(f"{where}: {message}", "distributed: {strategy: fsdp}")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is one that DeepSpeed gathers."""
    return hasattr(tensor, "ds_id") and not tensor.requires_grad


def measure_bytes(tensor: Tensor) -> tuple[int, int]:
    """Return how many bytes of a sharded tensor this process holds, and how many there are."""
    # its part, and the whole while that is gathered
    return tensor.ds_tensor.nbytes + tensor.nbytes, tensor.ds_numel * tensor.element_size()


def turn_on(network: PeftModel) -> None:
    """Let each process keep a part of each frozen weight of a network, and gather them as they are
    computed with. All processes have to do this at once."""
    device = network.device
    on_gpu = device.type == "cuda"
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    if not on_gpu:  # of shared memory, which wants a compiler at the first run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    assert deepspeed.comm.get_world_size() == ranks.count()
    trained = {name: tensor.data.to(device) for name, tensor in attach.walk_trainable(network)}
    hooks = DeepSpeedZeRoOffload(network, None, None, param_persistence_threshold=0)
    for name, tensor in attach.walk_trainable(network):
        _keep_whole(tensor, trained[name])

    def begin(*_: Any) -> None:
        hooks.release_backward_leftovers()  # of modules whose inputs have no gradient
        _let_gather(network, True)

    network.register_forward_pre_hook(begin, prepend=True)
    network.register_forward_hook(lambda *_: _let_gather(network, False), always_call=True)


def _keep_whole(tensor: Any, whole: Tensor) -> None:
    """Take what is trained back from DeepSpeed, which would drop it, and what was learnt, after its
    module has computed."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    tensor.data = whole
    tensor.ds_status = ZeroParamStatus.AVAILABLE
    tensor.ds_persist = True
    tensor.ds_tensor.resize_(0)
    tensor.partition = lambda **_: None


def _let_gather(network: nn.Module, allowed: bool) -> None:
    """Let weights that one module reads of another be gathered, as all processes do that at the
    same time."""
    for module in network.modules():
        module._parameters._in_forward = allowed
