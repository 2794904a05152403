"""What the memory plan says of a recipe that is settled but for it, and what is chosen by that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.common import LoraError
from lora_cli.models import num_experts
from lora_cli.plan import memory
from lora_cli.plan.auto_choices import Chosen, Situation
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.plan.live_bytes import OPTIMIZER
from lora_cli.recipe import Recipe
from lora_cli.speed import document_attention, step_packing

FASTEST_OPTIMIZER = "adamw_torch_fused"
FAR_BELOW = 0.1
SAFE = 0.9
"""Of a GPU's memory, what is taken by choice: no forecast was held against one yet."""


class Outlook(NamedTuple):
    """What the memory plan says of a recipe."""

    checkpointing: bool
    """Whether a step fits with gradient checkpointing only."""
    reason: str
    state: int = 0
    """Bytes of fused AdamW's state."""
    missing: int = 0
    """Bytes by which the plan with gradient checkpointing, or as the recipe has it, is still too
    large."""

    @property
    def spared(self) -> int:
        """Bytes that AdamW of 8 bits saves."""
        return self.state * 3 // 4


def foresee_memory(given: Situation) -> Outlook:
    """Rehearse a step of a recipe in which all else is settled, if that decides what is open."""
    recipe, device, config = given.recipe, given.device, given.config
    usual = device.kind == "cuda"
    still_open = {
        name: value
        for name, value in (("gradient_checkpointing", False), ("optim", FASTEST_OPTIMIZER))
        if getattr(recipe.training, name) == "auto"
    }
    if device.kind == "cuda":
        decides = bool(still_open) or given.lets_shard
    else:
        decides = "gradient_checkpointing" in still_open
    if config is None or not decides:
        return Outlook(usual, f"as on any {device.kind}")
    recipe = recipe.replace(recipe.trainer, {"training": still_open})
    if is_far_below(recipe, config, device):
        return Outlook(False, f"needs a small part of {device}")
    batch = memory.largest_batch(recipe)
    try:
        plain = memory.make_forecast(recipe, config, device).need(batch)
        if plain.total <= (SAFE if usual else 1) * device.memory:
            return Outlook(False, f"{memory.format_bytes(plain.total)} of {device} without it")
        if "gradient_checkpointing" not in still_open:
            return _measure_lack(plain, plain, device)
        again = recipe.replace(recipe.trainer, {"training": {"gradient_checkpointing": True}})
        saving = memory.make_forecast(again, config, device).need(batch)
    except LoraError as error:  # a mistake in the recipe is reported where it is used
        return Outlook(usual, str(error))
    return _measure_lack(saving, plain, device)


def _measure_lack(saving: memory.Need, plain: memory.Need, device: Hardware) -> Outlook:
    """Return the outlook of a step that does not fit without checkpointing (`plain`)."""
    with_it, without = memory.format_bytes(saving.total), memory.format_bytes(plain.total)
    reason = f"{with_it} with it, {without} without, of {device}"
    return Outlook(True, reason, saving.items.get(OPTIMIZER, 0), saving.total - device.memory)


def choose_optimizer(device: Hardware, outlook: Outlook) -> Chosen:
    """Fused AdamW, or AdamW of 8 bits where only a quarter of its state makes the run fit."""
    if device.kind == "cuda" and 0 < outlook.missing <= outlook.spared:
        return (
            "paged_adamw_8bit",
            f"saves {outlook.spared / GIB:.1f} GiB, without which it does not fit",
        )
    return FASTEST_OPTIMIZER, "the fastest AdamW"


def choose_strategy(given: Situation, outlook: Outlook) -> Chosen:
    """Return how several processes share the work: the base is sharded where a step with all of it
    fits no GPU, whatever the optimiser."""
    if given.device.kind != "cuda":
        return "ddp", "each process has the whole base, which is fastest"
    eased = outlook.spared if given.recipe.training.optim == "auto" else 0
    if outlook.missing <= eased:
        return "ddp", "a step with the whole base fits, which is fastest"
    for key, why in given.recipe.list_against_sharding():
        return "ddp", f"{'.'.join(key)}: {why}"
    lacking = memory.format_bytes(outlook.missing)
    return "fsdp", f"a step with the whole base needs {lacking} more than {given.device}"


def choose_packed_length(given: Situation) -> Chosen:
    """Return the longest sequence that is worth its memory; None where no rows are joined."""
    recipe, device, config = given.recipe, given.device, given.config
    if recipe.training.packing != "step":
        return None, "no rows are joined"
    usual = memory.find_packed_length(recipe)
    if config is None or not _attends_by_row(given):
        return usual, "longer ones spend more on attention than on the rest"
    together = recipe.training.max_length * recipe.training.per_device_train_batch_size
    together *= recipe.training.gradient_accumulation_steps
    length = step_packing.LONG_SEQUENCE
    while length // 2 >= max(together, usual):
        length //= 2
    try:
        forecast = memory.make_forecast(recipe, config, device)
        while length > usual:
            batch = memory.largest_batch(_set_packed_length(recipe, length))
            need = forecast.need(batch).total
            if need <= SAFE * device.memory:
                needed = f"{memory.format_bytes(need)} of {device} are needed"
                return length, f"each row attends by itself, and {needed}"
            length //= 2
    except LoraError as error:  # a mistake in the recipe is reported where it is used
        return usual, str(error)
    return usual, f"longer ones do not fit in {device}"


def _attends_by_row(given: Situation) -> bool:
    """Return whether the work of attention does not grow with the sequences that rows share."""
    model, device = given.recipe.model, given.device
    if device.kind != "cuda" or given.config is None:
        return False
    if model.attn_implementation is not None:
        return model.attn_implementation in document_attention.TAKE_BOUNDS
    dtype, longest = getattr(torch, model.dtype), given.recipe.training.max_length
    return document_attention.suits_kernel(given.config, dtype, device.capability, longest)


def _set_packed_length(recipe: Recipe, length: int) -> Recipe:
    return recipe.replace(recipe.trainer, {"training": {"packed_length": length}})


def is_far_below(recipe: Recipe, config: PretrainedConfig, device: Hardware) -> bool:
    """Return whether several times what any method takes is a small part of the device's memory.

    Saves small runs the second that a rehearsal takes.
    """
    if num_experts(config):
        return False
    text = config.get_text_config()
    batch = memory.largest_batch(recipe)
    tokens = batch.rows * (batch.length + batch.targets)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    sizes = [getattr(text, name, None) for name in names]
    hidden, layers, vocabulary, inner = (size if isinstance(size, int) else 0 for size in sizes)
    if not (hidden and layers and vocabulary):  # a family that gives its sizes otherwise
        return False
    layers *= 2 if batch.targets else 1  # the encoder's, and as many of the decoder's
    width = max(hidden, inner or 8 * hidden)
    weights = 4 * (2 * vocabulary * hidden + layers * 8 * hidden * width)
    activations = 4 * layers * (tokens * 64 * width + 2 * batch.rows * batch.length**2)
    logits = 12 * tokens * vocabulary
    return bool(4 * weights + activations + logits < FAR_BELOW * device.memory)
