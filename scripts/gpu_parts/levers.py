"""Ways to make a step quicker that a run can be given for a trial, beside what its recipe says.

Those that lora has for other devices are used as they are. Attention by document in one kernel
(`varlen`) is written here: lora does not have it yet, and whether it is worth having is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from gpu_parts.part import Bench, NotHereError
from lora_cli.speed import install, loss_head, step_packing
from lora_cli.train import run

VARLEN = "varlen"


@contextmanager
def _replace(place: Any, name: str, value: Any) -> Iterator[None]:
    """Let `place` have another `name` inside the block."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def use_sequences(length: int) -> Iterator[None]:
    """Join the rows of a step to sequences of up to `length` tokens."""
    with _replace(step_packing, "SEQUENCE", length):
        yield


@contextmanager
def use_head_chunks(logits: int) -> Iterator[None]:
    """Let the loss head make so many logits at a time."""
    with _replace(loss_head, "CHUNK", logits):
        yield


def attend_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each document of (1, heads, tokens, width), by one kernel.

    Documents begin where `position_ids` do not go up by one. They are looked for once in a forward
    pass, which waits for the device: a collator that knows the lengths would not.
    """
    positions = kwargs["position_ids"]
    if query.shape[0] != 1:
        raise ValueError("rows beside each other would need a mask, which this is not given")
    cuts, longest = find_cuts(positions)
    packed = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    made = torch.ops.aten._flash_attention_forward(
        *packed, cuts, cuts, longest, longest, 0.0, True, False, scale=kwargs.get("scaling")
    )[0]
    return made[None], None


def register_varlen() -> None:
    """Let transformers know it; without a mask function of its own it is given no mask."""
    AttentionInterface.register(VARLEN, attend_varlen)


LAST: list[tuple[Tensor, Tensor, int]] = []
"""The positions that were last looked at, where documents begin in them, and the longest."""


def find_cuts(positions: Tensor) -> tuple[Tensor, int]:
    """Return where documents begin, with the end (int32), and the length of the longest."""
    if LAST and LAST[0][0] is positions:
        return LAST[0][1], LAST[0][2]
    begins = (positions[0].diff() != 1).nonzero()[:, 0] + 1
    edges = torch.tensor([0, positions.shape[1]], device=positions.device)
    cuts = torch.cat([edges[:1], begins, edges[1:]]).int()
    LAST[:] = [(positions, cuts, int(cuts.diff().max()))]
    return cuts, LAST[0][2]


@contextmanager
def use_varlen() -> Iterator[None]:
    """Attend by document in one kernel."""
    register_varlen()
    own = run.setup.set_attention

    def set_attention(recipe: Any, base: Any, folder: Any) -> None:
        own(recipe, base, folder)
        base.set_attn_implementation(VARLEN)

    try:
        with _replace(run.setup, "set_attention", set_attention):
            yield
    finally:
        LAST.clear()


@contextmanager
def use_fused() -> Iterator[None]:
    """Compute adapted layers as one operation, as lora does on a processor."""
    own = install.install

    def install_all(adapted: Any, device: str) -> None:
        own(adapted, device)
        if device != "cpu" and not install.fused_layer.install(adapted):
            raise RuntimeError("no layer takes it")

    with _replace(install, "install", install_all):
        yield


@contextmanager
def use_liger() -> Iterator[None]:
    """Use Liger's norms, rotary embeddings and SwiGLU, without its loss."""
    from liger_kernel.transformers import monkey_patch

    own = run.setup.load_recipe_base

    def load(recipe: Any, base: Any) -> Any:
        network = own(recipe, base)
        monkey_patch._apply_liger_kernel_to_instance(
            model=network, fused_linear_cross_entropy=False, cross_entropy=False
        )
        return network

    with keep_llama(), _replace(run.setup, "load_recipe_base", load):
        yield


@contextmanager
def keep_llama() -> Iterator[None]:
    """Put transformers' Llama back after the block: Liger changes it for all that follow."""
    kind, before = modeling_llama.LlamaForCausalLM, dict(vars(modeling_llama))
    forward = kind.forward
    try:
        yield
    finally:
        vars(modeling_llama).update(before)
        kind.forward = forward


LEVERS = {VARLEN: use_varlen, "fused": use_fused, "liger": use_liger}


@contextmanager
def use(bench: Bench, names: list[str], sequence: int | None = None) -> Iterator[None]:
    """Use these levers inside the block, and sequences of a length where one is given."""
    for name in names:
        refuse_missing(bench, name)
    with ExitStack() as stack:
        if sequence is not None:
            stack.enter_context(use_sequences(sequence))
        for name in names:
            stack.enter_context(LEVERS[name]())
        yield


def refuse_missing(bench: Bench, name: str) -> None:
    """Raise NotHereError where the lever has no kernels for this machine."""
    if name == VARLEN and not bench.clock.on_gpu:
        raise NotHereError("flash attention of several lengths needs a GPU")
    if name == VARLEN and torch.cuda.get_device_capability() < (8, 0):
        raise NotHereError("flash attention needs a GPU of capability 8.0")
    if name == "liger" and not (find_spec("liger_kernel") and find_spec("triton")):
        raise NotHereError("Liger or Triton is not installed")
    if name == "liger" and not bench.clock.on_gpu:
        raise NotHereError("Liger's kernels need a GPU")
