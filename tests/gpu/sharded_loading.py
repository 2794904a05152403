"""Load a base and shard it over four processes on fake CUDA tensors, without a GPU, and print, as
JSON, the bytes on this process's GPU: `python -m tests.gpu.sharded_loading MODEL STRATEGY METHOD`.

FakeTensorMode knows devices and computes nothing; torch's process group "fake" answers at once. The
weights are read for real, and become fake ones where the run has asked for them: on the host or on
the GPU. Not seen: what the driver, kernels and collectives need for themselves, and a step.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # noqa: E402, I001
from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fully_shard  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lora_cli.common import devices  # noqa: E402
from lora_cli.common.files import scratch_folder  # noqa: E402
from lora_cli.distributed import ranks  # noqa: E402
from lora_cli.models import Base, attach, causality, host_blocks, targets  # noqa: E402
from lora_cli.recipe import Recipe, upstream  # noqa: E402
from lora_cli.speed import install  # noqa: E402
from lora_cli.train import adapted_base, collators, packing, sharding, trial  # noqa: E402
from lora_cli.train.task_trainer import find_trainer  # noqa: E402
from tests.gpu import fake_cuda  # before torch, which it tells of CUDA

WORLD = 4
GPU = torch.device("cuda", 0)
MODE = FakeTensorMode(allow_non_fake_inputs=True)


class Counted(TorchDispatchMode):
    """Knows which bytes of tensors are on the GPU, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        self.phases: dict[str, tuple[int, int]] = {}

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory, once."""
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.measure())

    def measure(self) -> int:
        """Return the bytes that are there now."""
        self.alive = {at: each for at, each in self.alive.items() if not each[0].expired()}
        return sum(nbytes for _, nbytes in self.alive.values())

    def end_phase(self, name: str) -> None:
        """Keep what is there now, and the most that has been since the last phase."""
        now = self.measure()
        self.phases[name], self.most = (now, self.most), now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "equal") and isinstance(args[0], FakeTensor):
            kind = args[0].dtype
            number = True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
            return number if name == "_local_scalar_dense" else False
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, FakeTensor) and each.device.type == "cuda":
                self.note(each)
        return made


def let_fake_tensors_move() -> None:
    """Let a fake tensor's `data` be replaced by one on another device, as a real one's can."""
    plain: Any = torch.Tensor.data

    def put(tensor: FakeTensor, other: FakeTensor) -> None:
        plain.__set__(tensor, other)
        tensor.fake_device = other.fake_device

    FakeTensor.data = property(plain.__get__, put)
    torch.utils.swap_tensors = put  # its own refuses what has weak references


def make_fake(network: nn.Module, device: torch.device, counted: Counted) -> None:
    """Make a network's tensors fake ones on a device."""
    known: dict[int, torch.Tensor] = {}
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, real in held.items():
                if real is not None and id(real) not in known:
                    fake = torch.empty(real.shape, dtype=real.dtype, device=device)
                    weight = held is module._parameters
                    known[id(real)] = nn.Parameter(fake, real.requires_grad) if weight else fake
                if real is not None:
                    held[name] = known[id(real)]
    if device.type == "cuda":
        for each in known.values():
            counted.note(each)


def become_one_of_four(strategy: str) -> None:
    """Be the first of four processes with a GPU each."""
    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda *given: None
    mesh = init_device_mesh("cuda", (WORLD,))
    _fully_shard._init_default_mesh = lambda: mesh  # its own would be of numbers that are not known
    ranks.count = lambda: WORLD
    if strategy == "deepspeed-zero3":
        os.environ |= {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"}
        module = importlib.import_module("deepspeed.accelerator.cuda_accelerator")
        kind = module.CUDA_Accelerator
        kind.is_synchronized_device = lambda self: True  # no streams
        kind.range_push = kind.range_pop = lambda *given, **options: None


def read_for_real(counted: Counted) -> Callable[..., Any]:
    """Return a `Base.load` that makes real weights fake ones on the device that it is given."""
    own = Base.load

    def load(base: Base, dtype: Any, quantization: Any, device: Any, **options: Any) -> Any:
        with _disable_current_modes():
            network = own(base, dtype, quantization, torch.device("cpu"), **options)
        make_fake(network, device, counted)
        return network

    return load


def forget_numbers() -> None:
    """Let what looks at numbers, which are not known, find nothing."""
    adapted_base.refuse_not_finite = lambda *given: None
    tried = causality._sees_later_tokens
    causality._sees_later_tokens = lambda network: bool(tried(network)) and False


def load(recipe: Recipe, base: Path, counted: Counted) -> tuple[Any, dict[str, Any]]:
    """Load a base and attach an adapter as `lora train` does, and say how large its parts are."""
    devices.find_device = lambda *given, **options: GPU
    network = adapted_base.load_recipe_base(recipe, Base(str(base)))
    counted.end_phase("loaded")
    blocks = host_blocks.find_blocks(network)
    sizes = {
        "weights": sum(each.nbytes for each in network.parameters()),
        "outside": host_blocks.measure_outside(network),
        "block": max(sum(each.nbytes for each in block.parameters()) for block in blocks),
    }
    run = SimpleNamespace(has_choice=lambda *given: False, replace_choice=lambda *given: None)
    recipe = packing.settle_packing(recipe, network, run)
    sizes["attention"] = network.config._attn_implementation
    counted.end_phase("tried")
    config, _ = targets.make_config(recipe, network, network.config.vocab_size, [], None)
    with attach.quiet_peft():
        adapted = attach.attach_adapter(network, config, recipe.lora.autocast_adapter_dtype)
    install.install(adapted, adapted.device.type)
    counted.end_phase("attached")
    return adapted, sizes


def shard(recipe: Recipe, base: Path, adapted: Any, folder: Path, counted: Counted) -> None:
    """Make the recipe's trainer, and let it shard the model as it does before its first step."""
    devices.find_device = lambda *given, **options: torch.device("cpu")  # torch has no driver here
    arguments = upstream.build_training_arguments(recipe)
    arguments.output_dir, arguments.__dict__["_setup_devices"] = str(folder), GPU
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = find_trainer(recipe)(
        replace(trial._make_options(recipe), sharded=recipe.distributed.strategy),
        model=adapted,
        args=arguments,
        train_dataset=Dataset.from_list(fake_cuda.make_rows()),
        processing_class=tokenizer,
        data_collator=collators.make_collator(recipe, tokenizer, 1024),
    )
    trainer.accelerator.state.device = GPU
    counted.end_phase("trainer")
    trainer.create_optimizer()
    model = trainer._wrap_model(adapted)
    if recipe.distributed.strategy == "fsdp":  # DeepSpeed's would be wrapped in DDP
        model, _ = trainer.accelerator.prepare(model, trainer.optimizer)
    counted.end_phase("sharded")


def main() -> None:
    """Print what was counted; BROKEN in the environment loads the base whole, as it was once."""
    base, strategy, method = Path(sys.argv[1]), *sys.argv[2:]
    recipe = fake_cuda.make_recipe({"method": method, "distributed": {"strategy": strategy}}, base)
    torch.nn.functional.scaled_dot_product_attention = fake_cuda.attend_on_cuda
    counted = Counted()
    let_fake_tensors_move()
    become_one_of_four(strategy)
    forget_numbers()
    Base.load = read_for_real(counted)
    if "BROKEN" in os.environ:
        host_blocks.suit = lambda *given: False
    with MODE, counted, scratch_folder() as folder:
        adapted, found = load(recipe, base, counted)
        shard(recipe, base, adapted, folder, counted)
        own, _ = sharding.measure(adapted)
        found["elsewhere"] = sum(
            each.device != GPU for each in (*adapted.parameters(), *adapted.buffers())
        )
    print(json.dumps(found | {"own": own} | counted.phases), file=sys.__stdout__, flush=True)
    os._exit(0)  # as fake_cuda.main does


if __name__ == "__main__":
    main()
