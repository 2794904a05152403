"""Ways to make a step quicker that a run can be given for a trial, or go without, beside what its
recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from transformers.models.llama import modeling_llama

from gpu_parts.part import Bench, NotHereError
from lora_cli.speed import install, loss_head


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
def use_head_chunks(logits: int) -> Iterator[None]:
    """Let the loss head make so many logits at a time, however few rows that are."""
    with _replace(loss_head, "CHUNK", logits), _replace(loss_head, "ROWS", 1):
        yield


@contextmanager
def use_peft() -> Iterator[None]:
    """Compute LoRA as PEFT does, not as one operation."""
    with _replace(install, "FUSED", ("cpu",)):
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


LEVERS = {"peft": use_peft, "liger": keep_llama}
"""Liger itself is asked for by the recipe."""


@contextmanager
def use(bench: Bench, names: list[str]) -> Iterator[None]:
    """Use these levers inside the block."""
    for name in names:
        refuse_missing(bench, name)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(LEVERS[name]())
        yield


def refuse_missing(bench: Bench, name: str) -> None:
    """Raise NotHereError where the lever has no kernels for this machine."""
    if name == "liger" and not (find_spec("liger_kernel") and find_spec("triton")):
        raise NotHereError("Liger or Triton is not installed")
    if name == "liger" and not bench.clock.on_gpu:
        raise NotHereError("Liger's kernels need a GPU")
