"""Every configuration of upstream's built once, and refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.common import UsageError, find_nearest, remote_code
from lora_cli.plan import hardware
from lora_cli.plan.auto import settle
from lora_cli.plan.hardware import Hardware
from lora_cli.recipe import Recipe, upstream

FLASH_NEEDS = {
    "flash_attention_2": (range(8, 100), "RTX 30, A100 and newer cards"),
    "flash_attention_3": (range(9, 10), "H100 and H200"),
}
"""First numbers of the compute capabilities that versions of flash attention run on, and in
words."""
REPORTERS = {"azure_ml": "azureml-core", "flyte": "flytekit", "neptune": "neptune-client"}
"""Packages by the names under which transformers reports to them, where the two differ."""


def try_configurations(recipe: Recipe, device: Hardware | None = None) -> None:
    """Build every configuration once, so that upstream refuses before anything is loaded.

    For this machine, or another device.
    """
    _refuse_unknown_attention(recipe)
    _refuse_attention_of_newer_cards(recipe, device)
    settled, _ = settle(recipe)
    upstream.build_lora_config(settled)
    upstream.build_quantization_config(settled)
    arguments = upstream.build_training_arguments(settled)
    if arguments.use_cpu and (device is None or device.kind == "cpu"):
        _refuse_what_needs_a_gpu(recipe, arguments)
    _refuse_unknown_reporters(recipe, arguments.report_to)


def _refuse_unknown_reporters(recipe: Recipe, names: list[str]) -> None:
    """Raise UsageError for what transformers does not report to, or cannot without a package."""
    place = recipe.where("training", "report_to")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            guess = find_nearest(name, INTEGRATION_TO_CALLBACK)
            listed = f"one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            hint = f"did you mean {guess}?" if guess else listed
            raise UsageError(f"{place}: there is no {name}", hint)
        if name not in get_available_reporting_integrations():
            package = REPORTERS.get(name, name)
            raise UsageError(f"{place}: {name} is not installed", f"pip install {package}")


def _refuse_unknown_attention(recipe: Recipe) -> None:
    """Raise UsageError for an attention that transformers does not know, or whose code is not
    allowed."""
    given = recipe.model.attn_implementation
    where = recipe.where("model", "attn_implementation")
    if remote_code.is_repository(given):
        remote_code.require_allowed(f"{where}: {given} is a repository of kernels", "sdpa")
        return
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if given not in (None, "auto", *known):
        guess = find_nearest(str(given), known)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(known)}"
        raise UsageError(f"{where}: there is no {given}", hint)


def _refuse_attention_of_newer_cards(recipe: Recipe, device: Hardware | None) -> None:
    """Raise UsageError for a version of flash attention that has no kernels for the GPU."""
    given = str(recipe.model.attn_implementation)
    if given not in FLASH_NEEDS:
        return
    device = device or hardware.detect_device(hardware.find_training_device(recipe))
    wanted, cards = FLASH_NEEDS[given]
    major, minor = device.capability
    if device.kind != "cuda" or not major or major in wanted:
        return
    place = recipe.where("model", "attn_implementation")
    raise UsageError(
        f"{place}: {given} runs on {cards}; {device.name} has compute capability {major}.{minor}",
        "--set model.attn_implementation=auto",
    )


def _refuse_what_needs_a_gpu(recipe: Recipe, arguments: Any) -> None:
    if arguments.fp16:
        asked = (
            ("training", "fp16") if recipe.find_place("training", "fp16") else ("model", "dtype")
        )
        remedy = "model.dtype=float32" if asked[0] == "model" else "training.fp16=false"
        raise UsageError(f"{recipe.where(*asked)}: float16 training needs a GPU", f"--set {remedy}")
    if getattr(arguments, "activation_offloading", False):
        place = recipe.where("training", "activation_offloading")
        raise UsageError(
            f"{place} moves what a GPU keeps to the host's memory, and there is no GPU", "remove it"
        )
