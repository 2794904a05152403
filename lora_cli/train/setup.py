"""What a run needs before its first step: the base, the adapter on it, and the trainer around
both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common import ui
from lora_cli.data import prepare
from lora_cli.models import Base, attach, init_weights, refuse_not_finite, targets, token_rows
from lora_cli.plan import auto, flops, hardware
from lora_cli.recipe import Recipe, upstream
from lora_cli.speed import document_attention, dora_norms, install, loss_head, step_packing
from lora_cli.train import out_of_memory
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Boundaries, keep_types
from lora_cli.train.signals import Signals
from lora_cli.train.trainers import WatchedSFTTrainer, WatchedTrainer


def load_recipe_base(recipe: Recipe, base: Base) -> PreTrainedModel:
    """The base as the recipe wants it stored."""
    set_seed(recipe.training.seed)
    network = base.load(
        getattr(torch, recipe.model.dtype),
        upstream.build_quantization_config(recipe),
        **(
            {"attn_implementation": recipe.model.attn_implementation}
            if recipe.model.attn_implementation
            else {}
        ),
    )
    refuse_not_finite(network, base.name)
    network.config.use_cache = False
    return network


def set_attention(recipe: Recipe, base: PreTrainedModel, run: dict[str, Any]) -> None:
    """Attention by document where the recipe leaves it open and the base's own does not know
    documents."""
    if recipe.model.attn_implementation:
        return
    apart = document_attention.install(base)
    reason = (
        "each document of a sequence by itself, the same for less time"
        if apart
        else "what the model has"
    )
    choice = auto.Choice("model.attn_implementation", base.config._attn_implementation, reason)
    run["choices"] = [
        *(made for made in run["choices"] if made["name"] != choice.name),
        choice._asdict(),
    ]
    ui.say(f"  {choice}")


def settle_packing(recipe: Recipe, base: PreTrainedModel) -> Recipe:
    """The recipe, with padded batches where rows in one sequence would see each other in this
    base."""
    why = step_packing.find_unsuitable(base) if recipe.training.packing == "step" else None
    if why is None:
        return recipe
    ui.say(f"  training.packing = false: {why}")
    return recipe.replace(recipe.trainer, {"training": {"packing": False}})


def attach_adapter(
    recipe: Recipe,
    base: Base,
    network: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: list[int],
    train_rows: prepare.Prepared,
) -> PeftModel:
    """The base with the recipe's adapter as training starts it."""
    set_seed(recipe.training.seed)
    config = upstream.build_lora_config(recipe)
    config.revision = base.revision  # so that other programs load the same base
    if new_ids:
        token_rows.grow_embeddings(network, len(tokenizer))
        token_rows.train_rows(network, config, new_ids)
    targets.check_targets(recipe, network, config)
    rows = [
        dict(row)
        for row in train_rows.rows.select(range(min(init_weights.ROWS, len(train_rows.rows))))
    ]
    collate = DataCollatorForLanguageModeling(pad_token_id=_find_pad_id(tokenizer))
    with attach.quiet_peft():
        init_weights.prepare_base(recipe, network, config, rows, collate)
        adapted = attach.attach_adapter(network, config, recipe.lora.autocast_adapter_dtype)
        init_weights.prepare_adapter(recipe, adapted, rows, collate, base)
    init_weights.keep_start(recipe, adapted, folder)
    install.install(adapted, adapted.device.type)
    if (options := upstream.read_compile_options(recipe)) is not None:
        ui.say(
            f"  {install.compile_layers(adapted, options)} layers are compiled at the first step"
        )
    return adapted


def _find_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def make_trainer(
    recipe: Recipe,
    folder: Path,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: prepare.Prepared,
    eval_rows: prepare.Prepared | None,
    run: dict[str, Any],
) -> WatchedSFTTrainer | WatchedTrainer:
    """The trainer the recipe names, around the adapted model."""
    pieces = out_of_memory.read_pieces(recipe, run)
    arguments = upstream.build_training_arguments(out_of_memory.apply_pieces(recipe, pieces))
    if arguments.gradient_checkpointing:
        adapted.enable_input_require_grads()
    common: dict[str, Any] = {
        "model": adapted,
        "args": arguments,
        "train_dataset": train_rows.rows if train_rows.stream is None else train_rows.stream,
        "eval_dataset": eval_rows.rows if eval_rows else None,
        "processing_class": tokenizer,
    }
    if recipe.training.packing == "step":
        common["data_collator"] = step_packing.StepCollator(pieces.sequence)
    elif recipe.trainer == "trainer":
        common["data_collator"] = DataCollatorForLanguageModeling(
            pad_token_id=_find_pad_id(tokenizer)
        )
    trainer: WatchedSFTTrainer | WatchedTrainer
    with keep_types(adapted):  # SFTTrainer casts adapters of a 4-bit base to bfloat16
        trainer = (
            WatchedSFTTrainer(**common) if recipe.trainer == "sft" else WatchedTrainer(**common)
        )
    if recipe.training.loraplus_lr_ratio is not None:
        given = {
            name: getattr(recipe.training, name)
            for name in ("loraplus_lr_ratio", "loraplus_lr_embedding")
        }
        trainer.loraplus = {name: value for name, value in given.items() if value is not None}
    if recipe.training.loss_head == "trained_tokens":
        base = adapted.get_base_model()
        other = loss_head.install(base)
        if other:
            ui.say(f"  training.loss_head = stock: {other}")
        else:
            trainer.own_loss = trainer.model_accepts_loss_kwargs = True
    trainer.watch, trainer.signals, trainer.run_id = Watch(folder), Signals(), run["id"]
    trainer.watch.limit, trainer.watch.where = (
        recipe.training.stop_on_loss_above,
        trainer.step_in_words,
    )
    trainer.boundary = {} if recipe.training.on_oom == "reduce" else None
    trainer.keep, arguments.save_total_limit = recipe.training.save_total_limit, None
    trainer.dora_layers = dora_norms.find_layers(adapted)
    trainer.watch.work = count_work(recipe, adapted, train_rows)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer.watch)
    trainer.add_callback(Boundaries(trainer))
    return trainer


def count_work(recipe: Recipe, adapted: PeftModel, train_rows: prepare.Prepared) -> flops.Work:
    """What training on one of these tokens costs, and what the device could do."""
    counts, device = train_rows.counts, hardware.detect_device()
    context = counts.tokens / max(len(train_rows.rows), 1)
    each = flops.count_per_token(adapted, context, counts.trained_tokens / max(counts.tokens, 1))
    return flops.Work(
        each, flops.find_peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None
    )
