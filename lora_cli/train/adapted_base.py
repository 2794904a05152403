"""The base on the device that trains it, and the adapter on it as training starts it."""

from __future__ import annotations

from functools import partial

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common import gpu_faults, ui
from lora_cli.data import load, preferences
from lora_cli.distributed import ranks
from lora_cli.models import (
    Base,
    attach,
    causality,
    host_blocks,
    init_weights,
    leave_out_cache,
    read_logits,
    refuse_not_finite,
    targets,
)
from lora_cli.plan import hardware
from lora_cli.recipe import Recipe, upstream
from lora_cli.scoring import Scorer, losses, make_scorer
from lora_cli.speed import install
from lora_cli.train import sharding
from lora_cli.train.collators import find_pad_id, make_collator
from lora_cli.train.inputs import Inputs
from lora_cli.train.run_folder import Run


def load_recipe_base(recipe: Recipe, base: Base) -> PreTrainedModel:
    """Return the base as the recipe wants it stored, on the device that trains it: what looks at it
    or installs something chooses by where it is. The blocks of one that is about to be sharded wait
    on the host."""
    set_seed(recipe.training.seed)
    device = hardware.find_training_device(recipe)
    for line in gpu_faults.describe_choice(device):
        ui.say(f"  {line}")
    sharded = sharding.find_sharding(recipe)
    if sharded == "fsdp" and recipe.quantized:
        recipe = _store_for_sharding(recipe)
    waits = sharded is not None and host_blocks.suit(recipe, base.build_empty())
    network = base.load(
        getattr(torch, recipe.model.dtype),
        upstream.build_quantization_config(recipe),
        torch.device("cpu") if waits else device,
        **(
            {"attn_implementation": recipe.model.attn_implementation}
            if recipe.model.attn_implementation
            else {}
        ),
    )
    if waits:
        host_blocks.keep(network, device)
    refuse_not_finite(network, base.name)
    if base.task.writes_next_tokens:
        causality.refuse_encoder(network, base.name)
    leave_out_cache(network)
    return network


def _store_for_sharding(recipe: Recipe) -> Recipe:
    """Return the recipe with 4-bit weights kept in the type that they are computed in: accelerate
    shards no bytes."""
    quantization = recipe.quantization
    if quantization.bnb_4bit_quant_storage != "uint8":
        return recipe
    kind = quantization.bnb_4bit_compute_dtype
    ui.say(f"  quantization.bnb_4bit_quant_storage = {kind}: uint8 is not sharded")
    return recipe.replace(recipe.trainer, {"quantization": {"bnb_4bit_quant_storage": kind}})


def attach_adapter(
    recipe: Recipe, base: Base, network: PreTrainedModel, run: Run, inputs: Inputs
) -> PeftModel:
    """Return the base with the recipe's adapter as training starts it."""
    set_seed(recipe.training.seed)
    parent = inputs.parent
    config, _ = targets.make_config(
        recipe, network, len(inputs.reader), inputs.new_ids, parent.folder if parent else None
    )
    config.revision = base.revision  # so that other programs load the same base
    if parent is not None:
        config.base_model_name_or_path = base.name
        adapted = parent.put_on(network, config, recipe.lora.autocast_adapter_dtype)
    else:
        adapted = _attach_new(recipe, base, network, config, inputs)
        if ranks.is_first():
            init_weights.keep_start(recipe, adapted, run.folder)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()  # whole copies: no scaler takes them in 16 bits
    install.install(adapted, adapted.device.type)
    if (options := upstream.read_compile_options(recipe)) is not None:
        compiled = install.compile_layers(adapted, options)
        ui.say(f"  {compiled} layers are compiled at the first step")
    return adapted


def _attach_new(
    recipe: Recipe, base: Base, network: PreTrainedModel, config: LoraConfig, inputs: Inputs
) -> PeftModel:
    """Return the base with a new adapter, initialised as the recipe says."""
    rows = inputs.train_rows.rows
    rows = rows.remove_columns(list(load.find_encoder(recipe.task_row).beside))
    first = [dict(row) for row in rows.select(range(min(init_weights.ROWS, len(rows))))]
    if recipe.objective_row.compares:
        first = [preferences.take_chosen(row) for row in first]
    put_together = (
        DataCollatorForLanguageModeling(pad_token_id=find_pad_id(inputs.reader))
        if recipe.task_row.writes_next_tokens
        else make_collator(recipe, inputs.reader, 0, network)
    )
    with attach.quiet_peft():
        loss = partial(_compute_loss, make_scorer(recipe))
        init_weights.prepare_base(recipe, network, config, first, put_together, loss)
        adapted = attach.attach_adapter(network, config, recipe.lora.autocast_adapter_dtype)
        init_weights.prepare_adapter(recipe, adapted, first, put_together, base)
    return adapted


def _compute_loss(
    scorer: Scorer | None, network: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the loss of a batch, the model's own where that writes."""
    if scorer is None:
        loss: torch.Tensor = network(**batch).loss
        return loss
    labels = batch.pop("labels")
    total = scorer.sum_loss(read_logits(network(**batch)), labels, batch.get("attention_mask"))
    return total / max(losses.count_labels(labels), 1)
