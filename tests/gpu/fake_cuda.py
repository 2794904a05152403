"""A training step on fake CUDA tensors, without a GPU: `python -m tests.gpu.fake_cuda CASE…` prints,
as JSON for each case, what is on the wrong device, what waits for the GPU and how many kernels run.

FakeTensorMode knows shapes, types and devices, and computes nothing. A CPU build of torch refuses
autograd on such tensors until hooks.cpp, loaded before torch, tells it that CUDA is there. What
torch's C++ chooses on CUDA alone (the kernel of scaled dot product attention) is emulated. Not seen:
kernels' own memory, speed, and whether a kernel exists, but for those whose name ends in `_for_cpu`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent
CASES = {
    "lora": {"method": "lora"},
    "lora, dropout": {"method": "lora", "lora": {"lora_dropout": 0.05}},
    "lora, checkpointing": {"method": "lora", "training": {"gradient_checkpointing": True}},
    "lora, float16": {"method": "lora", "model": {"dtype": "float16"}},
    "lora, float32": {"method": "lora", "model": {"dtype": "float32"}},
    "lora, stock head": {"method": "lora", "training": {"loss_head": "stock"}},
    "dora": {"method": "dora"},
    "dora, dropout": {"method": "dora", "lora": {"lora_dropout": 0.05}},
    "q_proj and embeddings": {
        "method": "lora",
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    },
}
"""Recipes by name."""
TOKENS = 256


def load_hooks() -> None:
    """Compile hooks.cpp once, and load it with torch's libraries, before torch is imported."""
    source, built = Path(__file__).with_name("hooks.cpp"), ROOT / "build/fake_cuda/hooks.so"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        built.parent.mkdir(parents=True, exist_ok=True)
        made = built.with_suffix(f".{os.getpid()}")
        command = [
            "c++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{TORCH}/include", f"-L{TORCH}/lib",
            str(source), "-o", str(made), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib",
        ]  # fmt: skip
        subprocess.run(command, check=True, stderr=subprocess.PIPE)
        made.replace(built)
    for library in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", built):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_hooks()
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from lora_cli.common import devices  # noqa: E402
from lora_cli.models import Base, attach, targets  # noqa: E402
from lora_cli.plan import auto, hardware  # noqa: E402
from lora_cli.recipe import Recipe  # noqa: E402
from lora_cli.speed import document_attention, install, loss_head  # noqa: E402
from lora_cli.train import setup  # noqa: E402

aten = torch.ops.aten
ON_CUDA = torch.library.Library("aten", "IMPL")
# one kernel on CUDA, which a CPU build of torch takes apart
ON_CUDA.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
# autocast asks the driver whether it is there
torch.cuda.is_bf16_supported = lambda *given, **options: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
devices.find_device = lambda *given, **options: torch.device("cpu")  # where real weights are read
REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention
H100 = hardware.Hardware("cuda", "H100", 80 << 30, (9, 0), bf16=True)
VIEWS = frozenset(
    "view t transpose expand slice detach alias unsqueeze squeeze permute select split as_strided "
    "split_with_sizes _unsafe_view unbind empty empty_like new_empty lift_fresh empty_strided unfold "
    "chunk is_pinned new_empty_strided _reshape_alias diagonal reshape view_as _local_scalar_dense "
    "narrow movedim flatten device is_same_size".split()
)
"""Operations that run no kernel."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
BY_MASK = ("index", "index_put", "index_put_", "_index_put_impl_")
WAITING = ("nonzero", "masked_select", "_unique2", "equal")


class Seen(TorchDispatchMode):
    """Counts and judges each operation on fake CUDA tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Count from nothing."""
        self.phase, self.kernels = "forward", Counter()
        self.waits, self.for_cpu, self.wide = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs, name = kwargs or {}, func._schema.name.split("::")[-1]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if not any(each.device.type == "cuda" for each in tensors):
            return func(*args, **kwargs)
        if name.endswith("_for_cpu") or "_for_cpu_" in name:
            self.for_cpu[f"{name} at {find_place()}"] += 1
        if name == "_local_scalar_dense":
            self.waits[f"a number is read at {find_place()}"] += 1
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        waited = self._wait(name, args)
        if waited is not None:
            return waited
        if name in PRODUCTS and any(
            each.dtype == torch.float32 and each.dim() > 1 for each in tensors
        ):
            self.wide[f"{name} [{self.phase}] at {find_place()}"] += 1
        if name not in VIEWS:
            self.kernels[self.phase] += 1
        return func(*args, **kwargs)

    def _wait(self, name, args):  # noqa: ANN001, ANN202
        """Count what waits for the GPU because a shape hangs on values; return its result."""
        if name in BY_MASK:
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            if masks:
                self.waits[f"{name} by a mask at {find_place()}"] += 1
                rest = args[0].shape[masks[0].dim() :]
                return (
                    args[0].new_empty((TOKENS // 2, *rest)) if name == "index" else args[0].clone()
                )
        if name in WAITING:
            self.waits[f"{name} at {find_place()}"] += 1
            if name == "nonzero":
                return args[0].new_empty((TOKENS // 2, args[0].dim()), dtype=torch.long)
        return None


def find_place() -> str:
    """Return the innermost line of lora_cli, or else of the libraries."""
    libraries = ("lora_cli", "transformers", "peft", "trl", "accelerate")
    found = None
    for frame in reversed(traceback.extract_stack()):
        for package in libraries:
            if f"/{package}/" in frame.filename:
                if package == "lora_cli" or found is None:
                    found = f"{package}/{frame.filename.split(f'/{package}/')[-1]} in {frame.name}"
                if package == "lora_cli":
                    return found
    return found or "autograd"


def attend_on_cuda(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # noqa: ANN001, ANN201, PLR0913, E501
    """Choose a kernel as torch does on CUDA: flash attention for half types without a mask, else the
    memory-efficient one with an additive mask of the query's type."""
    if query.device.type != "cuda":
        more = {"scale": scale, "enable_gqa": enable_gqa}
        return REAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **more)
    if attn_mask is None and query.dtype != torch.float32:
        given = (query, key, value, dropout_p, is_causal, False)
        return aten._scaled_dot_product_flash_attention(*given, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        empty = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = empty.masked_fill_(attn_mask.logical_not(), float("-inf"))
    heads = query.shape[:2]
    bias = None if attn_mask is None else attn_mask.expand(*heads, -1, -1)
    given = (query, key, value, bias, True, dropout_p, is_causal)
    return aten._scaled_dot_product_efficient_attention(*given, scale=scale)[0]


def move(network: nn.Module) -> None:
    """Make parameters and buffers fake CUDA tensors; what else a module holds stays behind."""
    known: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                known[id(parameter)] = nn.Parameter(made, parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def make_recipe(changes: dict, base: Path) -> Recipe:
    """Return a settled recipe for a GPU."""
    given = {
        "data": {"path": "x"},
        "output_dir": "unused",
        **changes,
        "model": {"name_or_path": str(base)} | changes.get("model", {}),
    }
    return auto.settle(Recipe.model_validate(given), Base(str(base)).config, H100)[0]


def make_step(changes: dict, base: Path, moved_last: bool = False) -> dict:
    """Set a model up as `lora train` does, and make a step forward and backward; return what was
    seen. `moved_last`: put it on the GPU after the set-up, as Trainer would."""
    recipe = make_recipe(changes, base)
    network = setup.load_recipe_base(recipe, Base(str(base)))
    mode, seen = FakeTensorMode(allow_non_fake_inputs=True), Seen()
    kind = getattr(torch, recipe.model.dtype)
    config, _ = targets.make_config(recipe, network, network.config.vocab_size, [], None)
    with attach.quiet_peft():  # PEFT moves adapters by swapping tensors, which fake ones refuse
        adapted = attach.attach_adapter(network, config, recipe.lora.autocast_adapter_dtype)
    if moved_last:
        install_levers(adapted)
    with mode, seen:
        move(adapted)
        if not moved_last:
            install_levers(adapted)
        if recipe.training.loss_head == "trained_tokens":
            loss_head.install(adapted.get_base_model())
        adapted.train()
        if recipe.training.gradient_checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        seen.reset()
        half = kind != torch.float32
        with attach.keep_input_types(adapted, half), torch.autocast("cuda", kind, enabled=half):
            loss = compute_loss(adapted)
        seen.phase = "backward"
        loss.backward()
    return {name: dict(getattr(seen, name)) for name in ("kernels", "waits", "for_cpu", "wide")}


def install_levers(adapted: nn.Module) -> None:
    """Install what makes a step quicker where the model is."""
    document_attention.install(adapted.get_base_model())
    install.install(adapted, adapted.device.type)


def compute_loss(adapted: nn.Module) -> torch.Tensor:
    """Return the loss of one sequence of several documents, half of whose tokens have labels."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="cuda")
    positions = torch.zeros(1, TOKENS, dtype=torch.long, device="cuda")
    given = {"input_ids": ids, "position_ids": positions, "labels": ids}
    return adapted(**given, num_items_in_batch=TOKENS // 2, use_cache=False).loss


def main() -> None:
    """Print what each named case does, or all of them."""
    faulthandler.enable()
    torch.nn.functional.scaled_dot_product_attention = attend_on_cuda
    base, *names = sys.argv[1:]
    moved_last = "MOVED_LAST" in os.environ
    for name in names or CASES:
        try:
            found = make_step(CASES[name], Path(base), moved_last)
        except Exception as error:  # noqa: BLE001 – what breaks is what it prints
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = {"breaks": f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"}
        print(json.dumps({"case": name} | found), file=sys.__stdout__, flush=True)
    # autograd's thread of a device, which CPU builds never start, may want Python after it has ended,
    # and is then aborted with the program
    os._exit(0)


if __name__ == "__main__":
    main()
