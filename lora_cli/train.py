"""`lora train`: a recipe becomes an adapter.

Recipe -> settled values -> claimed folder -> rows -> base with a fresh adapter -> Trainer or SFTTrainer -> adapter/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
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
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli import (
    attention,
    data,
    dora,
    dropout,
    files,
    flops,
    foreign,
    fused,
    hardware,
    identity,
    initial,
    loss,
    memory,
    model,
    packing,
    plan,
    private,
    record,
    selection,
    targets,
    tokens,
    ui,
    upstream,
    verify,
)
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.trainers import WatchedSFTTrainer, WatchedTrainer, types_kept
from lora_cli.watch import NonFiniteError, Watch


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run the recipe and return the adapter's folder. The run's record says how it ended, whatever happens."""
    upstream.check(recipe)
    commit, config = model.of_recipe(recipe)
    device = hardware.here()
    levers = memory.levers(config, device)
    recipe, choices = upstream.settle(recipe, model.checkpoint_dtype(config), device, levers)
    folder = Path(recipe.output_dir)
    contents = {
        "choices": [choice._asdict() for choice in choices],
        "base": {
            "name": recipe.model.name_or_path,
            "commit": commit,
            "fingerprint": identity.fingerprint(recipe.model.name_or_path, commit),
        },
    }
    run = record.begin(folder, recipe.plain(), contents, resume)
    ui.say(f"{recipe.method} on {recipe.model.name_or_path} -> {folder}")
    for choice in choices:
        ui.say(f"  {choice}")
    try:
        return _run(recipe, folder, run, resume)
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        record.update(folder, run, status="interrupted")
        checkpoint = get_last_checkpoint(str(folder))
        ui.say(f"\n--resume continues from {checkpoint}" if checkpoint else "\nno checkpoint had been saved yet")
        raise
    except BaseException:
        record.update(folder, run, status="failed")
        raise


def _run(recipe: Recipe, folder: Path, run: dict[str, Any], resume: bool) -> Path:
    commit = run["base"]["commit"]
    tokenizer, new_ids, template = model.tokenizer_for(recipe, commit)
    ui.say(f"  chat template: {template}")
    plan.adapter(recipe, commit, tokenizer, new_ids)
    train_rows, eval_rows = data.load(recipe, tokenizer, date.fromisoformat(run["started"][:10]))
    ui.say(f"  data: {train_rows.summary()}")
    if eval_rows:
        ui.say(f"  evaluation: {eval_rows.summary()}")
    plan.refuse_unknown_ids(recipe, commit, train_rows, tokenizer)
    plan.steps(recipe, train_rows)
    _same_rows(folder, run, train_rows, tokenizer)
    with _refusals_told(folder):
        base = _base(recipe, commit)
        _attend(recipe, base, run)
        recipe = _suited(recipe, base)
        adapted = _adapted(recipe, base, commit, folder, tokenizer, new_ids, train_rows)
        trainer = _trainer(recipe, folder, adapted, tokenizer, train_rows, eval_rows)
    trained = trainer.model
    trainable, total = trained.get_nb_trainable_parameters()
    layers = len(model.lora_layers(trained))
    ui.say(f"  adapter: {trainable:,} of {total:,} parameters trained, in {layers} modules")
    _say_packed(recipe, trainer, train_rows)
    started = time.monotonic()
    checkpoint = _checkpoint(folder) if resume else None
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.watch.progress.clear()
    adapter = folder / "adapter"
    run |= {
        "status": "finished",
        "parameters": {"trainable": trainable, "total": total, "modules": layers},
        "results": {"steps": result.global_step, "train_loss": result.training_loss}
        | trainer.watch.effort(trainer.state),
    }
    _save(trained, tokenizer, adapter, run, folder / initial.START)
    record.update(folder, run)
    ui.say(
        f"trained {result.global_step} steps in {ui.duration(time.monotonic() - started)}, "
        f"mean loss {result.training_loss:.4f}; adapter in {adapter}"
    )
    return adapter


def _say_packed(recipe: Recipe, trainer: WatchedSFTTrainer | WatchedTrainer, train_rows: data.Prepared) -> None:
    """How full TRL's packing made the sequences."""
    if recipe.training.packing in (True, "dataset") and train_rows.stream is None:
        packed = len(trainer.train_dataset)
        fill = train_rows.counts.tokens / (packed * trainer.args.max_length)
        ui.say(
            f"  packed: {len(train_rows.rows)} rows in {packed} of {trainer.args.max_length} tokens, {fill:.0%} full"
        )


@contextmanager
def _refusals_told(folder: Path) -> Iterator[None]:
    """What the libraries refuse inside is a LoraError in their words."""
    try:
        yield
    except (ValueError, TypeError, ImportError, ArithmeticError) as error:
        if foreign.translate(error) is not None:
            raise
        said = " ".join(str(error).split())
        raise LoraError(
            f"transformers, TRL or PEFT refuse this recipe: {said}", f"see {folder / 'recipe.yaml'}"
        ) from error


def _facts(rows: data.Prepared, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a run's record keeps of the rows it trained on."""
    return {
        "fingerprint": rows.fingerprint,
        "commit": rows.commit,
        "read": rows.counts.read,
        "rows": len(rows.rows),
        "tokens": rows.counts.tokens,
        "trained_tokens": rows.counts.trained_tokens,
        "left_out": dict(rows.counts.left_out),
        "stop_token_ids": selection.stop_ids(tokenizer, rows.counts),
        "streamed": rows.stream is not None,
    }


def _same_rows(
    folder: Path, run: dict[str, Any], train_rows: data.Prepared, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Record what is trained on, before it is; LoraError when a resumed run began with other rows."""
    before, now = run.get("data"), _facts(train_rows, tokenizer)
    if before and before["fingerprint"] != now["fingerprint"]:
        raise LoraError(
            f"the run in {folder} began with other rows: the data, tokenizer or chat template have changed since",
            "undo the change; record.json says what they were",
        )
    record.update(folder, run, data=now)


def _base(recipe: Recipe, commit: str | None) -> PreTrainedModel:
    """The base as the recipe wants it stored."""
    set_seed(recipe.training.seed)
    base = model.load_base(
        recipe.model.name_or_path,
        commit,
        getattr(torch, recipe.model.dtype),
        upstream.quantization_config(recipe),
        **({"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}),
    )
    base.config.use_cache = False
    return base


def _attend(recipe: Recipe, base: PreTrainedModel, run: dict[str, Any]) -> None:
    """Attention by document where the recipe leaves it open and the base's own does not know documents."""
    if recipe.model.attn_implementation:
        return
    apart = attention.install(base)
    reason = "each document of a sequence by itself, the same for less time" if apart else "what the model has"
    choice = upstream.Choice("model.attn_implementation", base.config._attn_implementation, reason)
    run["choices"] = [*run["choices"], choice._asdict()]
    ui.say(f"  {choice}")


def _suited(recipe: Recipe, base: PreTrainedModel) -> Recipe:
    """The recipe, with padded batches where rows in one sequence would see each other in this base."""
    why = packing.unsuitable(base) if recipe.training.packing == "step" else None
    if why is None:
        return recipe
    ui.say(f"  training.packing = false: {why}")
    return recipe.settled(recipe.trainer, {"training": {"packing": False}})


def _adapted(
    recipe: Recipe,
    base: PreTrainedModel,
    commit: str | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: list[int],
    train_rows: data.Prepared,
) -> PeftModel:
    """The base with the recipe's adapter as training starts it."""
    set_seed(recipe.training.seed)
    config = upstream.lora_config(recipe)
    config.revision = commit  # so that other programs load the same base
    if new_ids:
        tokens.grow(base, len(tokenizer))
        tokens.train_rows(base, config, new_ids)
    targets.check(recipe, base, config)
    rows = [dict(row) for row in train_rows.rows.select(range(min(initial.ROWS, len(train_rows.rows))))]
    collate = DataCollatorForLanguageModeling(pad_token_id=_pad(tokenizer))
    with model.quiet_peft():
        initial.before_attaching(recipe, base, config, rows, collate)
        adapted = model.attach_adapter(base, config, recipe.lora.autocast_adapter_dtype)
        initial.after_attaching(recipe, adapted, rows, collate, commit)
    initial.keep_start(recipe, adapted, folder)
    return adapted


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _trainer(
    recipe: Recipe,
    folder: Path,
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: data.Prepared,
    eval_rows: data.Prepared | None,
) -> WatchedSFTTrainer | WatchedTrainer:
    """The trainer the recipe names, around the adapted model."""
    arguments = upstream.training_arguments(recipe)
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
        common["data_collator"] = packing.StepCollator(min(recipe.training.max_length, packing.SEQUENCE))
    elif recipe.trainer == "trainer":
        common["data_collator"] = DataCollatorForLanguageModeling(pad_token_id=_pad(tokenizer))
    trainer: WatchedSFTTrainer | WatchedTrainer
    with types_kept(adapted):  # SFTTrainer casts adapters of a 4-bit base to bfloat16
        trainer = WatchedSFTTrainer(**common) if recipe.trainer == "sft" else WatchedTrainer(**common)
    if recipe.training.loraplus_lr_ratio is not None:
        given = {name: getattr(recipe.training, name) for name in ("loraplus_lr_ratio", "loraplus_lr_embedding")}
        trainer.loraplus = {name: value for name, value in given.items() if value is not None}
    if recipe.training.loss_head == "trained_tokens":
        base = adapted.get_base_model()
        other = loss.install(base)
        if other:
            ui.say(f"  training.loss_head = stock: {other}")
        else:
            trainer.own_loss = trainer.model_accepts_loss_kwargs = True
    dropout.install(adapted)
    fused.install(adapted)
    trainer.dora_layers = dora.install(adapted)  # after all else: it remembers what the base's weights are
    trainer.watch = Watch(folder)
    trainer.watch.work = _work(recipe, adapted, train_rows)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer.watch)
    return trainer


def _work(recipe: Recipe, adapted: PeftModel, train_rows: data.Prepared) -> flops.Work:
    """What training on one of these tokens costs, and what the device could do."""
    counts, device = train_rows.counts, hardware.here()
    context = counts.tokens / max(len(train_rows.rows), 1)
    each = flops.per_token(adapted, context, counts.trained_tokens / max(counts.tokens, 1))
    return flops.Work(each, flops.peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None)


RESUMABLE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")


def _checkpoint(folder: Path) -> str:
    """The last checkpoint, if it holds all that makes the continued run the same run."""
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is None:
        raise LoraError(f"{folder} holds no checkpoint to resume from", f"rm -r {folder} and train again")
    missing = [name for name in RESUMABLE if not any(Path(checkpoint).glob(name))]
    if missing:
        raise LoraError(
            f"{checkpoint} lacks {', '.join(missing)}: the run would go on as another one",
            f"rm -r {checkpoint} to resume from the one before, or rm -r {folder} to start again",
        )
    ui.say(f"  resuming from {checkpoint}")
    return str(checkpoint)


def _save(
    trained: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, run: dict[str, Any], start: Path
) -> None:
    """Write adapter, tokenizer, template, probes and record, whole or not at all; refuses what is not finite."""
    for name, parameter in model.trainable(trained):
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name} is not finite: the adapter was not saved", "lower training.learning_rate")
    with files.staged_folder(adapter) as staging:
        verify.save_trained(trained, tokenizer, staging)
        # no whole embeddings: those that changed are among the adapter's own tensors
        with model.quiet_peft():
            trained.save_pretrained(str(staging), save_embedding_layers=False)
        initial.as_plain(staging, trained.peft_config["default"], start)
        model.save_tokenizer(tokenizer, staging, private.expanded(run["base"]["name"]), run["base"]["commit"])
        files.leave_out_home(staging)
        files.write_json(staging / record.ARTEFACT_RECORD, run)
