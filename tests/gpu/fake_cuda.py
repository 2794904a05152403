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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent
PADDED = {"training": {"packing": False}}
ADAPTED = {"target_modules": ["q_proj", "embed_tokens"]}
STEPS = {
    "lora": {"method": "lora"},
    "lora, dropout": {"method": "lora", "lora": {"lora_dropout": 0.05}},
    "lora, checkpointing": {"method": "lora", "training": {"gradient_checkpointing": True}},
    "lora, float16": {"method": "lora", "model": {"dtype": "float16"}},
    "lora, float32": {"method": "lora", "model": {"dtype": "float32"}},
    "lora, stock head": {"method": "lora", "training": {"loss_head": "stock"}},
    "lora, sdpa": {"method": "lora", "model": {"attn_implementation": "sdpa"}},
    "lora, padded": {"method": "lora"} | PADDED,
    "dora": {"method": "dora"},
    "dora, dropout": {"method": "dora", "lora": {"lora_dropout": 0.05}},
    "dora, float16": {"method": "dora", "model": {"dtype": "float16"}},
    "dora, checkpointing": {"method": "dora", "training": {"gradient_checkpointing": True}},
    "qlora": {"method": "qlora"},
    "qlora, dropout": {"method": "qlora", "lora": {"lora_dropout": 0.05}},
    "qlora, float16": {"method": "qlora", "model": {"dtype": "float16"}},
    "qlora, checkpointing": {"method": "qlora", "training": {"gradient_checkpointing": True}},
    "qdora": {"method": "qdora"},
    "qdora, dropout": {"method": "qdora", "lora": {"lora_dropout": 0.05}},
    "qdora, float16": {"method": "qdora", "model": {"dtype": "float16"}},
    "qdora, checkpointing": {"method": "qdora", "training": {"gradient_checkpointing": True}},
    "q_proj and embeddings": {"method": "lora", "lora": ADAPTED},
}
"""Recipes by name: a step of the network alone."""
TRAINED = {
    "sft": {"trainer": "sft"},
    "sft, padded": {"trainer": "sft"} | PADDED,
    "sft, data set packed": {"trainer": "sft", "training": {"packing": "dataset"}},
    "sft, stock head": {"trainer": "sft", "training": {"loss_head": "stock"}},
    "trainer": {"trainer": "trainer"},
    "trainer, padded": {"trainer": "trainer"} | PADDED,
    "trainer, adapted head": {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    "sft, qdora": {"method": "qdora"},
}
"""Recipes by name: two micro-batches and an optimiser step of the run's own trainer."""
ANSWERED = {"generate, lora": {"method": "lora"}, "generate, dora": {"method": "dora"}}
"""Recipes by name: an answer of their adapter's."""
CASES = {**STEPS, **TRAINED, **ANSWERED}
LENGTHS = (100, 28, 60, 68)
"""Of the rows of a step, whose second half has labels."""


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
from bitsandbytes.nn import Linear4bit  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import PeftModel  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Padded  # noqa: E402

from lora_cli.common import devices  # noqa: E402
from lora_cli.common.files import scratch_folder  # noqa: E402
from lora_cli.evaluate import answerers, hf_answerers, loaded_bases  # noqa: E402
from lora_cli.models import Base, attach, targets  # noqa: E402
from lora_cli.plan import auto, hardware, weightless  # noqa: E402
from lora_cli.recipe import Recipe, upstream  # noqa: E402
from lora_cli.speed import (  # noqa: E402
    document_attention,
    dora_norms,
    fused_layer,
    install,
    loss_head,
    step_packing,
)
from lora_cli.train import adapted_base, collators, trial  # noqa: E402
from lora_cli.train.task_trainer import find_trainer  # noqa: E402

aten = torch.ops.aten
ON_CUDA = torch.library.Library("aten", "IMPL")
# one kernel on CUDA, which a CPU build of torch takes apart
ON_CUDA.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
ON_CUDA.impl(
    "_fused_rms_norm",
    lambda x, *given: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    "CUDA",
)
ON_CUDA.impl(
    "_fused_rms_norm_backward", lambda grad, x, *given: (torch.empty_like(x), None), "CUDA"
)
# autocast asks the driver whether it is there
torch.cuda.is_bf16_supported = lambda *given, **options: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False


class Event:
    """An event of a GPU, which is not there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self) -> None:
        """Nothing runs."""


torch.Event = Event
torch.cuda.get_device_capability = lambda *given: (9, 0)
devices.find_device = lambda *given, **options: torch.device("cpu")  # where real weights are read
REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention
H100 = hardware.Hardware("cuda", "H100", 80 << 30, (9, 0), bf16=True)
APPLE = hardware.Hardware("mps", "Apple's GPU", 32 << 30, bf16=True)
DEVICE = os.environ.get("FAKE", "cuda")
"""Where the tensors are: `mps` makes no difference but to what the project chooses by it."""
VIEWS = frozenset(
    "view t transpose expand slice detach alias unsqueeze squeeze permute select split as_strided "
    "split_with_sizes _unsafe_view unbind empty empty_like new_empty lift_fresh empty_strided unfold "
    "chunk is_pinned new_empty_strided _reshape_alias diagonal reshape view_as _local_scalar_dense "
    "narrow movedim flatten device is_same_size".split()
)
"""Operations that run no kernel."""
FOUND = ("kernels", "casts", "waits", "for_cpu", "wide")
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
        self.casts = Counter()
        self.waits, self.for_cpu, self.wide = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs, name = kwargs or {}, func._schema.name.split("::")[-1]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if not any(each.device.type == DEVICE for each in tensors):
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
        self.casts[self.phase] += name == "_to_copy" and kwargs.get("dtype") is not None
        return func(*args, **kwargs)

    def _wait(self, name, args):  # noqa: ANN001, ANN202
        """Count what waits for the GPU because a shape hangs on values; return its result."""
        if name in BY_MASK:
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            if masks:
                self.waits[f"{name} by a mask at {find_place()}"] += 1
                rest = args[0].shape[masks[0].dim() :]
                return (
                    args[0].new_empty((sum(LENGTHS) // 2, *rest))
                    if name == "index"
                    else args[0].clone()
                )
        if name in WAITING:
            self.waits[f"{name} at {find_place()}"] += 1
            if name == "nonzero":
                return args[0].new_empty((sum(LENGTHS) // 2, args[0].dim()), dtype=torch.long)
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
    if query.device.type == "cpu":
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
                with torch.device(DEVICE):
                    known[id(parameter)] = weightless._fake_tensor(module, parameter)
            if parameter is not None:
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def move_inputs(given: Any) -> Any:
    """Return a batch whose tensors are fake ones on CUDA."""
    if isinstance(given, torch.Tensor):
        return torch.empty(given.shape, dtype=given.dtype, device=DEVICE)
    return (
        {name: move_inputs(each) for name, each in given.items()}
        if isinstance(given, dict)
        else given
    )


def make_recipe(changes: dict, base: Path) -> Recipe:
    """Return a settled recipe for a GPU."""
    given = {
        "data": {"path": "x"},
        "output_dir": "unused",
        **changes,
        "model": {"name_or_path": str(base)} | changes.get("model", {}),
    }
    return auto.settle(
        Recipe.model_validate(given), Base(str(base)).config, APPLE if DEVICE == "mps" else H100
    )[0]


def attach_to_base(recipe: Recipe, base: Path) -> PeftModel:
    """Return the base with the recipe's adapter, where real weights are read."""
    network = adapted_base.load_recipe_base(recipe, Base(str(base)))
    config, _ = targets.make_config(recipe, network, network.config.vocab_size, [], None)
    with attach.quiet_peft():  # PEFT moves adapters by swapping tensors, which fake ones refuse
        return attach.attach_adapter(network, config, recipe.lora.autocast_adapter_dtype)


def make_rows() -> list[dict[str, list[int]]]:
    """Return the rows of a step."""
    return [
        {"input_ids": [1] * length, "labels": [-100] * (length // 2) + [1] * (length - length // 2)}
        for length in LENGTHS
    ]


def make_step(recipe: Recipe, base: Path, seen: Seen) -> None:
    """Set a model up as `lora train` does, and make a step forward and backward."""
    moved_last = os.environ.get("BROKEN") == "moved last"
    adapted = attach_to_base(recipe, base)
    padded = loss_head.LabelCollator(Padded(pad_token_id=0))
    batch = (collators.make_collator(recipe, None, 1024) or padded)(make_rows())
    if moved_last:
        install_levers(recipe, adapted)
    with FakeTensorMode(allow_non_fake_inputs=True), seen:
        move(adapted)
        if not moved_last:
            install_levers(recipe, adapted)
        own_head = recipe.training.loss_head == "trained_tokens"
        if own_head:
            loss_head.install(adapted.get_base_model())
        adapted.train()
        if recipe.training.gradient_checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        [given] = split(batch, own_head, document_attention.takes_bounds(adapted))
        seen.reset()
        kind = getattr(torch, recipe.model.dtype)
        half = kind != torch.float32
        with attach.keep_input_types(adapted, half), torch.autocast(DEVICE, kind, enabled=half):
            loss = adapted(**given, num_items_in_batch=128, use_cache=False).loss
        seen.phase = "backward"
        loss.backward()


def split(batch: dict, labelled: bool, documents: bool) -> list[dict]:
    """Return a batch's sequences on CUDA, as a trainer splits them."""
    batch = move_inputs(dict(batch))
    if step_packing.CUTS not in batch:
        return [batch]
    return step_packing.split_sequences(batch, labelled, documents)


def train_step(recipe: Recipe, base: Path, seen: Seen) -> None:
    """Make two micro-batches and an optimiser step by the recipe's trainer."""
    recipe = recipe.replace(recipe.trainer, {"training": {"gradient_accumulation_steps": 2}})
    adapted, device = attach_to_base(recipe, base), torch.device(DEVICE)
    install_levers(recipe, adapted, DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with scratch_folder() as folder:
        arguments = upstream.build_training_arguments(recipe)
        arguments.output_dir = str(folder)
        trainer = find_trainer(recipe)(
            replace(trial._make_options(recipe), dora_layers=dora_norms.find_layers(adapted)),
            model=adapted,
            args=arguments,
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
            data_collator=collators.make_collator(recipe, tokenizer, 1024),
        )
        if recipe.training.packing == "dataset":
            batch = trainer.data_collator([trainer.train_dataset[0]])
        else:
            batch = trainer.data_collator(make_rows())
        # it was made where torch has no GPU
        trainer.accelerator.state.device = trainer.args.__dict__["_setup_devices"] = device
        for layer in dora_norms.find_layers(adapted):
            layer.squares = None  # made when the loss head was tried
        with FakeTensorMode(allow_non_fake_inputs=True), seen:
            move(adapted)
            batch = move_inputs(dict(batch))
            take_step(trainer, adapted, batch, seen)


def take_step(trainer: Any, adapted: PeftModel, batch: dict, seen: Seen) -> None:
    """Make the micro-batches and the step as Trainer's loop does."""
    adapted.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    for _ in range(2):
        seen.reset()
        with attach.keep_input_types(adapted, True):
            trainer.training_step(adapted, dict(batch), 128)
    seen.phase = "optimizer"
    norm = trainer._get_grad_norm(adapted, trainer._clip_grad_norm(adapted))
    assert norm is trainer.watch.gradient_norm
    told = {"model": adapted, "optimizer": trainer.optimizer}
    trainer.watch.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, **told)
    trainer.optimizer.step()
    if DEVICE == "cuda":
        assert trainer.optimizer.found_inf.device == trainer.watch.unread.copied.device


def answer(recipe: Recipe, base: Path, seen: Seen) -> None:
    """Answer with the recipe's adapter as `lora generate` does."""
    adapted = attach_to_base(recipe, base)
    dora_norms.install(adapted)
    tokenizer = AutoTokenizer.from_pretrained(base)
    bases = loaded_bases.Bases()
    # fake tensors have a backend here only outside of inference
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), seen:
        move(adapted)
        bases.loaded["it"] = adapted.eval()
        seen.reset()
        asked = [answerers.Asked([{"role": "user", "content": words}]) for words in ("a", "b c")]
        answerer = hf_answerers.HFAnswerer(bases, "it", "default", tokenizer)
        answerer.answer(asked, answerers.Sampling(4, 0.0))


def install_levers(recipe: Recipe, adapted: PeftModel, device: str | None = None) -> None:
    """Install what makes a step quicker where the model is, or as on `device`."""
    network = adapted.get_base_model()
    longest = recipe.training.max_length if recipe.training.packing == "step" else None
    if device:
        if device == "cuda" and longest:
            document_attention.use_kernel(network)
    elif recipe.model.attn_implementation is None:
        document_attention.install(network, longest)
    with unset_fake_temporarily():  # some of the layers that are installed compute then
        install.install(adapted, device or adapted.device.type)


def break_by_mask() -> None:
    """Let the loss head take its rows by a mask."""

    def select(tensor: torch.Tensor, _: int, places: torch.Tensor) -> torch.Tensor:
        return tensor[torch.ones(len(tensor), dtype=torch.bool, device=places.device)]

    torch.Tensor.index_select = select


def break_by_factor() -> None:
    """Let DoRA multiply by its factor as it is, in float32."""
    fused_layer._scale_columns = lambda x, factor, *_: x * factor


BREAK = {"moved last": lambda: None, "mask": break_by_mask, "factor": break_by_factor}
"""What BROKEN in the environment asks for: faults that were there once, and are to be seen. One is a
base that is put on the GPU after the set-up, as Trainer would."""


def make_case(name: str, base: Path) -> dict:
    """Return what was seen of a case."""
    recipe, seen = make_recipe(CASES[name], base), Seen()
    if name in STEPS:
        make_step(recipe, base, seen)
    else:
        (train_step if name in TRAINED else answer)(recipe, base, seen)
    return {name: dict(getattr(seen, name)) for name in FOUND}


def main() -> None:
    """Print what each named case does, or all of them."""
    faulthandler.enable()
    torch.nn.functional.scaled_dot_product_attention = attend_on_cuda
    base, *names = sys.argv[1:]
    if "BROKEN" in os.environ:
        BREAK[os.environ["BROKEN"]]()
    for name in names or CASES:
        try:
            found = make_case(name, Path(base))
        except Exception as error:  # noqa: BLE001 – what breaks is what it prints
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = {"breaks": f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"}
        print(json.dumps({"case": name} | found), file=sys.__stdout__, flush=True)
    # autograd's thread of a device, which CPU builds never start, may want Python after it has ended,
    # and is then aborted with the program
    os._exit(0)


if __name__ == "__main__":
    main()
