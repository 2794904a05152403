"""The trainer that a recipe names, set up around the adapted model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from lora_cli.common import ui
from lora_cli.data import prepare, unpaired
from lora_cli.models import find_picture_shape
from lora_cli.plan import flops, hardware, weightless
from lora_cli.recipe import Recipe, strict_yaml, upstream
from lora_cli.scoring import make_scorer
from lora_cli.speed import dora_norms
from lora_cli.train import (
    dealing,
    out_of_memory,
    pair_batches,
    picture,
    samples,
    sharding,
    unpaired_batches,
)
from lora_cli.train.collators import make_collator
from lora_cli.train.inputs import Inputs
from lora_cli.train.options import RunOptions
from lora_cli.train.run_folder import Run
from lora_cli.train.task_trainer import find_trainer
from lora_cli.train.trainers import Watched


def make_trainer(recipe: Recipe, adapted: PeftModel, inputs: Inputs, run: Run) -> Watched:
    """Return the trainer the recipe names, around the adapted model."""
    train_rows, eval_rows = inputs.train_rows, inputs.eval_rows
    longest = recipe.training.max_length
    pieces = out_of_memory.read_pieces(recipe, run)
    arguments = upstream.build_training_arguments(out_of_memory.apply_pieces(recipe, pieces))
    arguments.save_total_limit = None  # Trainer would also delete checkpoints of other runs
    # given to its constructor, it would ask for checkpoints at evaluations and at no other step
    arguments.load_best_model_at_end = recipe.training.keep == "best"
    batches = dealing.spread(arguments, adapted, train_rows.stream is not None)
    if arguments.dataloader_pin_memory and not recipe.find_place("training", "accelerator_config"):
        arguments.accelerator_config.non_blocking = adapted.device.type == "cuda"
    if arguments.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return find_trainer(recipe)(
        make_options(recipe, adapted, inputs, run, batches),
        model=adapted,
        args=arguments,
        train_dataset=_give_rows(train_rows, inputs.references[0], longest),
        eval_dataset=_give_rows(eval_rows, inputs.references[1], longest) if eval_rows else None,
        processing_class=inputs.reader,
        data_collator=make_collator(
            recipe, inputs.reader, pieces.sequence, adapted.get_base_model()
        ),
    )


def _give_rows(rows: prepare.Prepared, reference: torch.Tensor | None, longest: int) -> Any:
    """Return rows, of up to so many tokens, as a trainer takes them."""
    if reference is not None and unpaired.DESIRABLE in rows.rows.column_names:
        return unpaired_batches.HeldAgainst(rows.rows, reference, longest)
    if reference is not None:
        return pair_batches.ComparedPairs(rows.rows, reference)
    return rows.rows if rows.stream is None else rows.stream


def make_options(
    recipe: Recipe,
    adapted: PeftModel,
    inputs: Inputs,
    run: Run,
    batches: dealing.Batches | None,
) -> RunOptions:
    """Return what the recipe asks of the trainer that upstream's arguments cannot say."""
    training = recipe.training
    return RunOptions(
        run_id=run.id,
        work=count_work(recipe, adapted, inputs.train_rows),
        keep_checkpoints=training.save_total_limit,
        loss_limit=training.stop_on_loss_above,
        recipe=strict_yaml.dump(run.record.recipe.to_data()),
        keeps_best=training.keep == "best",
        patience=training.early_stopping_patience,
        least_gain=training.early_stopping_threshold,
        reduce_on_oom=training.on_oom == "reduce",
        own_loss_head=training.loss_head == "trained_tokens",
        loraplus=read_loraplus(recipe),
        preference=recipe.preference if recipe.objective_row.compares else None,
        checks_start=recipe.objective_row.needs_reference,
        scorer=make_scorer(recipe),
        written_tokens=recipe.max_target_length if training.generate_at_evaluation else 0,
        batches=batches,
        sharded=sharding.find_sharding(recipe),
        replicas=recipe.distributed.replicas,
        dora_layers=dora_norms.find_layers(adapted),
        subject=picture.name_subject(recipe),
        planned=inputs.planned,
        samples=_settle_samples(recipe, run),
    )


def _settle_samples(recipe: Recipe, run: Run) -> samples.Asked:
    """Return the prompts that are answered at evaluations."""
    prompts = recipe.training.sample_prompts
    if prompts and sharding.find_sharding(recipe):
        ui.say("  training.sample_prompts: left out, as a sharded model does not write")
        return samples.Asked()
    stops = run.record.data.stop_token_ids if run.record.data else []
    return samples.Asked(prompts, recipe.training.sample_tokens, stops)


def read_loraplus(recipe: Recipe) -> dict[str, float]:
    """Return the arguments of PEFT's optimiser of two learning rates; none where there is one."""
    training = recipe.training
    if training.loraplus_lr_ratio is None:
        return {}
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    values = {name: getattr(training, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def count_work(recipe: Recipe, adapted: PeftModel, train_rows: prepare.Prepared) -> flops.Work:
    """Return what training on one of these tokens, or pictures, costs, and what the device can do
    at most."""
    counts = train_rows.counts
    device = hardware.detect_device(hardware.find_training_device(recipe))
    peak = flops.find_peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None
    if recipe.task_row.reads_pictures:
        shape = find_picture_shape(recipe.model.name_or_path, recipe.model.revision)
        empty = weightless.build_adapted(recipe, adapted.get_base_model().config)
        return flops.Work(flops.count_per_picture(empty, shape), peak, recipe.task_row.unit)
    context = counts.tokens / max(len(train_rows.rows), 1)
    each = flops.count_per_token(adapted, context, counts.trained_tokens / max(counts.tokens, 1))
    return flops.Work(each, peak)
