"""What a run needs before its first step: rows, the base, the adapter on it, the trainer."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common import LoraError, gpu_faults, ui
from lora_cli.data import collate, load, preferences, prepare, selection
from lora_cli.distributed import ranks
from lora_cli.models import (
    Base,
    Parent,
    PictureProcessor,
    Reader,
    attach,
    causality,
    decoder,
    find_picture_shape,
    find_positions,
    init_weights,
    leave_out_cache,
    load_recipe_reader,
    read_logits,
    refuse_not_finite,
    targets,
)
from lora_cli.plan import auto, flops, hardware, memory, rehearsal, sizes
from lora_cli.recipe import Recipe, strict_yaml, upstream
from lora_cli.scoring import Scorer, losses, make_scorer
from lora_cli.speed import document_attention, dora_norms, install, step_packing
from lora_cli.train import (
    dealing,
    disk_space,
    out_of_memory,
    pair_batches,
    picture,
    reference,
    samples,
)
from lora_cli.train.options import RunOptions
from lora_cli.train.run_folder import Run
from lora_cli.train.task_trainer import find_trainer
from lora_cli.train.trainers import Watched


class Inputs(NamedTuple):
    """What a run has ready before the base's weights are loaded."""

    reader: Reader
    """The tokenizer, or the image processor."""
    new_ids: list[int]
    """Ids of the tokens that the recipe adds."""
    parent: Parent | None
    """The adapter that the run trains on."""
    train_rows: prepare.Prepared
    eval_rows: prepare.Prepared | None
    disk: disk_space.Need
    planned: int | None = None
    """Bytes that this process has at most as it trains, by the memory plan; None where there is
    none."""
    references: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """How likely the answers of pairs are at the start, of both kinds of rows."""


def prepare_inputs(recipe: Recipe, base: Base, parent: Parent | None, run: Run) -> Inputs:
    """Tokenizer and rows; LoraError for what would waste the run, such as too small a disk."""
    sizes.refuse_lack_of_experts(recipe, base)
    reader, new_ids, template = load_recipe_reader(recipe, base, parent)
    if template:
        ui.say(f"  chat template: {template}")
    size = sizes.measure_adapter(recipe, base, reader, new_ids, parent)
    if size.left_out:
        ui.say(f"  lora.target_modules: all-linear leaves out {size.left_out}")
    train_rows, eval_rows = load.load_rows(recipe, reader, run.record.day)
    ui.say(f"  data: {train_rows.summarise()}")
    if eval_rows:
        ui.say(f"  evaluation: {eval_rows.summarise()}")
    sizes.refuse_unknown_ids(recipe, base, train_rows, reader, parent)
    both = [train_rows, *filter(None, [eval_rows])]
    if beyond := sizes.check_positions(recipe, base, reader, both):
        ui.warn(beyond)
    steps = sizes.count_steps(recipe, train_rows).steps
    disk = disk_space.estimate_need(recipe, size.trainable, len(reader), steps)
    if ranks.is_first():
        disk_space.refuse_too_little(run.folder, disk)
    _refuse_other_rows(run, train_rows, reader)
    if eval_rows and recipe.data.holds_out:
        run.update(holdout={"rows": len(eval_rows.rows), "fingerprint": eval_rows.fingerprint})
    planned = _foresee_memory(recipe, base, train_rows) if ranks.is_first() else None
    if planned is not None:
        run.add(planned_memory_gb=round(planned / 1e9, 3))
    return Inputs(reader, new_ids, parent, train_rows, eval_rows, disk, planned)


def _foresee_memory(recipe: Recipe, base: Base, rows: prepare.Prepared) -> int | None:
    """Return how many bytes this process has at most as it trains, if the memory plan can say it,
    and it is more than a small part of the device's."""
    device = hardware.detect_device(hardware.find_training_device(recipe))
    if recipe.distributed.shards or auto.is_far_below(recipe, base.config, device):
        return None
    batch = memory.largest_batch(recipe, None if rows.stream is not None else rows)
    try:
        need = memory.make_forecast(recipe, base.config, device).need(batch)
    except LoraError:  # what is mistaken is said where it is used
        return None
    # what is there already, a CPU's tensors are beside
    return need.total + (hardware.measure_memory() if device.kind == "cpu" else 0)


def _describe_rows(rows: prepare.Prepared, reader: Reader) -> dict[str, Any]:
    """Return what a run's record keeps of the rows it trains on."""
    return {
        "fingerprint": rows.fingerprint,
        "commit": rows.commit,
        "read": rows.counts.read,
        "rows": len(rows.rows),
        "tokens": rows.counts.tokens,
        "trained_tokens": rows.counts.trained_tokens,
        "left_out": dict(rows.counts.left_out),
        "stop_token_ids": selection.find_stop_ids(reader, rows.counts),
        "streamed": rows.stream is not None,
    }


def _refuse_other_rows(run: Run, train_rows: prepare.Prepared, reader: Reader) -> None:
    """Record the rows before training on them; LoraError when a resumed run began with others."""
    now = _describe_rows(train_rows, reader)
    before = run.record.data
    if before and before.fingerprint != now["fingerprint"]:
        changed = "the data, tokenizer or chat template have changed since"
        raise LoraError(
            f"the run in {run.folder} began with other rows: {changed}",
            "undo the change; record.json says what they were",
        )
    run.update(data=now)


def load_recipe_base(recipe: Recipe, base: Base) -> PreTrainedModel:
    """Return the base as the recipe wants it stored, on the device that trains it: what looks at it
    or installs something chooses by where it is."""
    set_seed(recipe.training.seed)
    device = hardware.find_training_device(recipe)
    for line in gpu_faults.describe_choice(device):
        ui.say(f"  {line}")
    if find_sharding(recipe) == "fsdp" and recipe.quantized:
        recipe = _store_for_sharding(recipe)
    network = base.load(
        getattr(torch, recipe.model.dtype),
        upstream.build_quantization_config(recipe),
        device,
        **(
            {"attn_implementation": recipe.model.attn_implementation}
            if recipe.model.attn_implementation
            else {}
        ),
    )
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


def settle_packing(recipe: Recipe, base: PreTrainedModel, run: Run) -> Recipe:
    """Install attention by document if the recipe leaves it open and the base's own lacks it, and
    try on the base that rows of a sequence do not see each other.

    Return the recipe, with padded batches for a base in which they do; and with sequences no longer
    than on a CPU where the attention that long ones want did not do.
    """
    if not recipe.task_row.writes_next_tokens:
        return recipe
    packed = recipe.training.packing == "step"
    longest = recipe.training.max_length if packed else None
    as_on_cpu = min(recipe.training.max_length, step_packing.SEQUENCE)
    apart = not recipe.model.attn_implementation and document_attention.install(base, longest)
    why = _try_packing(recipe, base, apart) if packed else None
    if why and apart:
        document_attention.remove(base)
        ui.say(f"  attention by document is left out: {why}")
        apart, recipe = False, _shorten(recipe, run, as_on_cpu, THROUGH_MASK)
        why = _try_packing(recipe, base, False)
    elif packed and not apart and not document_attention.takes_bounds(base):
        recipe = _shorten(recipe, run, as_on_cpu, THROUGH_MASK)
    if not recipe.model.attn_implementation:
        _say_attention(base, run, apart)
    if why is None:
        return recipe
    ui.say(f"  training.packing = false: {why}")
    padded = {"packing": False, "packed_length": None}
    return recipe.replace(recipe.trainer, {"training": padded})


THROUGH_MASK = "rows attend through a mask in this base"


def fit_positions(recipe: Recipe, base: Base, run: Run) -> Recipe:
    """Return the recipe with sequences that a base's table of positions holds, where `auto` made
    them longer: that a place is not in the table spoils a GPU's whole process."""
    if memory.find_packed_length(recipe) <= step_packing.SEQUENCE:
        return recipe
    found = find_positions(base)
    if found is None or not found.ends:
        return recipe
    return _shorten(recipe, run, found.number, "the base has a table of so many positions")


def _shorten(recipe: Recipe, run: Run, length: int, reason: str) -> Recipe:
    """Return the recipe with sequences of `length` tokens, where `auto` made them longer."""
    chosen = run.has_choice("training.packed_length")
    if not chosen or memory.find_packed_length(recipe) <= length:
        return recipe
    choice = auto.Choice("training.packed_length", length, reason)
    run.replace_choice(choice)
    ui.say(f"  {choice}")
    return recipe.replace(recipe.trainer, {"training": {"packed_length": length}})


def _try_packing(recipe: Recipe, base: PreTrainedModel, apart: bool) -> str | None:
    """Return why rows of a step cannot share sequences in a base; None if they can.

    An attention of lora's own (`apart`) may be none for this base: what it raises is a reason.
    """
    try:
        longest = max(each.total for each in selection.list_limits(recipe))
        pair = longest if recipe.objective_row.compares else 0  # it is not parted
        return step_packing.find_unsuitable(base, max(pair, memory.find_packed_length(recipe)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if not apart:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _say_attention(base: PreTrainedModel, run: Run, apart: bool) -> None:
    """Say, and record, by which attention the base trains."""
    reason = (
        "each document of a sequence by itself, the same for less time"
        if apart
        else "what the model has"
    )
    choice = auto.Choice("model.attn_implementation", base.config._attn_implementation, reason)
    run.replace_choice(choice)
    ui.say(f"  {choice}")


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
        DataCollatorForLanguageModeling(pad_token_id=_find_pad_id(inputs.reader))
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


def _find_pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def make_trainer(recipe: Recipe, adapted: PeftModel, inputs: Inputs, run: Run) -> Watched:
    """Return the trainer the recipe names, around the adapted model."""
    train_rows, eval_rows = inputs.train_rows, inputs.eval_rows
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
        train_dataset=_give_rows(train_rows, inputs.references[0]),
        eval_dataset=_give_rows(eval_rows, inputs.references[1]) if eval_rows else None,
        processing_class=inputs.reader,
        data_collator=make_collator(
            recipe, inputs.reader, pieces.sequence, adapted.get_base_model()
        ),
    )


def _give_rows(rows: prepare.Prepared, reference: torch.Tensor | None) -> Any:
    """Return rows as a trainer takes them."""
    if reference is not None:
        return pair_batches.ComparedPairs(rows.rows, reference)
    return rows.rows if rows.stream is None else rows.stream


def add_references(recipe: Recipe, base: Base, adapted: PeftModel, inputs: Inputs) -> Inputs:
    """Return the inputs with what the model says of the rows' answers before the first step, where
    they are held against that."""
    if not recipe.objective_row.needs_reference:
        return inputs
    collate = make_collator(recipe, inputs.reader, memory.find_packed_length(recipe))
    train, evaluation = (
        reference.find_reference(recipe, base, adapted, part.rows, collate) if part else None
        for part in (inputs.train_rows, inputs.eval_rows)
    )
    return inputs._replace(references=(train, evaluation))


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
        sharded=find_sharding(recipe),
        replicas=recipe.distributed.replicas,
        dora_layers=dora_norms.find_layers(adapted),
        subject=picture.name_subject(recipe),
        planned=inputs.planned,
        samples=_settle_samples(recipe, run),
    )


def _settle_samples(recipe: Recipe, run: Run) -> samples.Asked:
    """Return the prompts that are answered at evaluations."""
    prompts = recipe.training.sample_prompts
    if prompts and find_sharding(recipe):
        ui.say("  training.sample_prompts: left out, as a sharded model does not write")
        return samples.Asked()
    stops = run.record.data.stop_token_ids if run.record.data else []
    return samples.Asked(prompts, recipe.training.sample_tokens, stops)


def find_sharding(recipe: Recipe) -> Literal["fsdp", "deepspeed-zero3"] | None:
    """Return by what each of several processes holds a part of the base; None where each has it
    whole."""
    strategy = recipe.distributed.strategy
    if ranks.count() > 1 and (strategy == "fsdp" or strategy == "deepspeed-zero3"):
        return strategy
    return None


def read_loraplus(recipe: Recipe) -> dict[str, float]:
    """Return the arguments of PEFT's optimiser of two learning rates; none where there is one."""
    training = recipe.training
    if training.loraplus_lr_ratio is None:
        return {}
    names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
    values = {name: getattr(training, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def make_collator(
    recipe: Recipe, reader: Reader, sequence: int, network: PreTrainedModel | None = None
) -> Any:
    """Return the collator that makes batches of rows, or where `packing: step` sequences of up to
    `sequence` tokens; None where TRL has its own. What the decoder of a `network` with an encoder
    is fed, it makes itself."""
    measured = losses.is_measured(recipe.model.problem_type)
    if isinstance(reader, PictureProcessor):
        width = len(recipe.model.labels) if measured else 1
        dtype = getattr(torch, recipe.model.dtype)
        return collate.PictureCollator(reader, measured, width, dtype)
    multiple = recipe.training.collect_values().get("pad_to_multiple_of")
    if recipe.task_row.has_targets:
        return collate.PairCollator(reader, partial(decoder.shift_labels, network), multiple)
    if not recipe.task_row.writes_next_tokens:
        return collate.TaskCollator(
            reader,
            recipe.task_row.places_labels,
            measured,
            multiple,
            load.find_encoder(recipe.task_row).beside,
        )
    if recipe.objective_row.compares:
        packed = recipe.training.packing == "step"
        padded = pair_batches.PaddedPairs(_find_pad_id(reader), multiple)
        return pair_batches.PairSteps(sequence) if packed else padded
    if recipe.training.packing == "step":
        return step_packing.StepCollator(sequence)
    if not recipe.uses_trl:
        return DataCollatorForLanguageModeling(pad_token_id=_find_pad_id(reader))
    return None


def count_work(recipe: Recipe, adapted: PeftModel, train_rows: prepare.Prepared) -> flops.Work:
    """Return what training on one of these tokens, or pictures, costs, and what the device can do
    at most."""
    counts = train_rows.counts
    device = hardware.detect_device(hardware.find_training_device(recipe))
    peak = flops.find_peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None
    if recipe.task_row.reads_pictures:
        shape = find_picture_shape(recipe.model.name_or_path, recipe.model.revision)
        empty = rehearsal.build_adapted(recipe, adapted.get_base_model().config)
        return flops.Work(flops.count_per_picture(empty, shape), peak, recipe.task_row.unit)
    context = counts.tokens / max(len(train_rows.rows), 1)
    each = flops.count_per_token(adapted, context, counts.trained_tokens / max(counts.tokens, 1))
    return flops.Work(each, peak)
