"""What each `auto` of a recipe becomes on this machine, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.common import UsageError, find_nearest, remote_code
from lora_cli.plan import hardware
from lora_cli.plan.hardware import Hardware
from lora_cli.recipe import Recipe, Section, upstream


class Choice(NamedTuple):
    """What one `auto` became, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name} = {shown} (auto: {self.reason})"


def settle(
    recipe: Recipe,
    checkpoint_dtype: torch.dtype,
    device: Hardware | None = None,
    levers: Callable[[Recipe], dict[str, tuple[Any, str]]] | None = None,
) -> tuple[Recipe, list[Choice]]:
    """The recipe with every `auto` replaced, and the choices made.

    `checkpoint_dtype` is the base's type on disk; `device` what it is to run on, by default this
    machine's. `levers` decides last what the memory plan has to say to (`memory.levers`): without
    it, by the kind of device alone.
    """
    device, choices = device or hardware.detect_device(), list[Choice]()

    def choose(section: Section, name: str, label: str, value: Any, reason: str) -> Any:
        if getattr(section, name) != "auto":
            return getattr(section, name)
        choices.append(Choice(label, value, reason))
        return value

    model, training = recipe.model, recipe.training
    head = recipe.adapts_head
    reason = (
        "SFTTrainer cannot adapt the output head"
        if head
        else "rows and labels are the same for both"
    )
    trainer = choose(recipe, "trainer", "trainer", "trainer" if head else "sft", reason)
    on_disk = str(checkpoint_dtype).removeprefix("torch.")
    dtype = choose(model, "dtype", "model.dtype", *hardware.dtype(device, on_disk))
    name = "attn_implementation"
    found = hardware.attention(device, dtype)
    open_ = (
        found[0] is None and model.attn_implementation == "auto"
    )  # transformers' choice is told with the model
    attention = None if open_ else choose(model, name, f"model.{name}", *found)
    changes: dict[str, dict[str, Any]] = {
        "model": {"dtype": dtype, name: attention},
        "training": {},
        "quantization": {},
    }
    if recipe.quantized:
        name = "bnb_4bit_compute_dtype"
        changes["quantization"][name] = choose(
            recipe.quantization, name, f"quantization.{name}", dtype, "as model.dtype"
        )
    has_eval = bool(recipe.data.eval_path or recipe.data.eval_split)
    for name, value, reason in (
        ("bf16", dtype == "bfloat16", f"model.dtype is {dtype}"),
        ("loss_head", *_loss_head(recipe)),
        ("packing", *_packing(recipe)),
        ("torch_compile", *hardware.compiled(device)),
        ("use_liger_kernel", *hardware.liger(device)),
        ("dataloader_num_workers", 0, "the rows are prepared before the run"),
        (
            "eval_strategy",
            "epoch" if has_eval else "no",
            "evaluation data given" if has_eval else "no evaluation data",
        ),
    ):
        changes["training"][name] = choose(training, name, f"training.{name}", value, reason)
    on, reason = device.kind == "cuda", f"as on any {device.kind}"
    usual = {"gradient_checkpointing": (on, reason), "optim": hardware.optimizer(device, 0, 0)}
    left = [name for name in usual if getattr(training, name) == "auto"]
    decides = left if device.kind == "cuda" else {"gradient_checkpointing"}.intersection(left)
    if decides and levers is not None:
        without = {"gradient_checkpointing": False, "optim": usual["optim"][0]}
        asked = {name: without[name] for name in left}
        usual = levers(recipe.replace(trainer, changes | {"training": changes["training"] | asked}))
    for name, (value, reason) in usual.items():
        changes["training"][name] = choose(training, name, f"training.{name}", value, reason)
    return recipe.replace(trainer, changes), choices


def _loss_head(recipe: Recipe) -> tuple[str, str]:
    given = recipe.training.collect_values()
    for name, usual in (
        ("label_smoothing_factor", 0.0),
        ("loss_type", "nll"),
        ("use_liger_kernel", False),
    ):
        if given.get(name) not in (None, "auto", usual):
            return "stock", f"training.{name} needs it"
    return "trained_tokens", "the same loss for less time and memory"


def _packing(recipe: Recipe) -> tuple[str | bool, str]:
    for name in ("padding_free", "dataloader_drop_last", "pad_to_multiple_of", "eval_packing"):
        if recipe.training.collect_values().get(name):
            return False, f"training.{name} is given"
    return "step", "no padding, and the same run"


def try_configurations(recipe: Recipe, device: Hardware | None = None) -> None:
    """Build every configuration once, so that what upstream refuses is refused before anything is
    loaded; for this machine, or another device."""
    if remote_code.is_repository(recipe.model.attn_implementation):
        where = recipe.where("model", "attn_implementation")
        remote_code.require_allowed(
            f"{where}: {recipe.model.attn_implementation} is a repository of kernels", "sdpa"
        )
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if (given := recipe.model.attn_implementation) not in (
        None,
        "auto",
        *known,
    ) and not remote_code.is_repository(given):
        where = recipe.where("model", "attn_implementation")
        guess = find_nearest(str(given), known)
        raise UsageError(
            f"{where}: there is no {given}",
            f"did you mean {guess}?" if guess else f"one of {', '.join(known)}",
        )
    settled, _ = settle(recipe, torch.float32)
    upstream.build_lora_config(settled)
    upstream.build_quantization_config(settled)
    arguments = upstream.build_training_arguments(settled)
    without = arguments.use_cpu and (device is None or device.kind == "cpu")
    if arguments.fp16 and without:
        place = recipe.where("training", "fp16")
        raise UsageError(f"{place}: float16 training needs a GPU", "--set model.dtype=float32")
    if getattr(arguments, "activation_offloading", False) and without:
        place = recipe.where("training", "activation_offloading")
        raise UsageError(
            f"{place} moves what a GPU keeps to the host's memory, and there is no GPU", "remove it"
        )
    known = get_available_reporting_integrations()
    for name in arguments.report_to:
        if name not in known:
            place = recipe.where("training", "report_to")
            installed = ", ".join(known) or "none"
            raise UsageError(
                f"{place}: {name} is not installed or not known; there is {installed}",
                f"pip install {name}",
            )
