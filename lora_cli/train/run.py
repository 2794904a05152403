"""`lora train`: a recipe becomes an adapter.

Recipe -> settled values -> claimed folder -> rows -> base with a fresh adapter -> Trainer or SFTTrainer -> adapter/.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common import files, provenance, ui
from lora_cli.common import privacy as private
from lora_cli.common.errors import LoraError
from lora_cli.data import prepare as data
from lora_cli.data import selection
from lora_cli.models import attach, finite, targets
from lora_cli.models import base as model
from lora_cli.models import fingerprint as identity
from lora_cli.models import init_weights as initial
from lora_cli.models import probes as verify
from lora_cli.models import token_rows as tokens
from lora_cli.models import tokenizer as tokenizing
from lora_cli.models.config import checkpoint_dtype, of_recipe
from lora_cli.plan import auto, flops, hardware, memory
from lora_cli.plan import sizes as plan
from lora_cli.recipe import upstream
from lora_cli.recipe.keys import Recipe
from lora_cli.speed import document_attention as attention
from lora_cli.speed import dora_norms as dora
from lora_cli.speed import install as quick
from lora_cli.speed import loss_head as loss
from lora_cli.speed import step_packing as packing
from lora_cli.train import checkpoints, lock, run_folder
from lora_cli.train import disk_space as disk
from lora_cli.train import out_of_memory as oom
from lora_cli.train import refusals as refusal
from lora_cli.train.progress import NonFiniteError, Watch
from lora_cli.train.resume import Boundaries, types_kept
from lora_cli.train.signals import Signals
from lora_cli.train.trainers import WatchedSFTTrainer, WatchedTrainer


def train(recipe: Recipe, resume: bool = False, allowed: Sequence[str] = ()) -> Path:
    """Run the recipe and return the adapter's folder. The run's record says how it ended, whatever happens.

    With `resume` the run in the recipe's folder goes on from its newest checkpoint; of the recipe, the keys `allowed`
    may have changed.
    """
    auto.check(recipe)
    commit, config = of_recipe(recipe)
    device = hardware.here()
    recipe, choices = auto.settle(recipe, checkpoint_dtype(config), device, memory.levers(config, device))
    folder = Path(recipe.output_dir)
    contents = {
        "choices": [choice._asdict() for choice in choices],
        "base": {
            "name": recipe.model.name_or_path,
            "commit": commit,
            "fingerprint": identity.fingerprint(recipe.model.name_or_path, commit),
        },
    }
    run_folder.check_place(folder)
    if resume and not folder.is_dir():
        raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
    files.make_folder(folder)
    with lock.held(folder):
        checkpoints.sweep(folder)
        run = run_folder.begin(folder, recipe.plain(), contents, resume, allowed)
        ui.say(f"{recipe.method} on {recipe.model.name_or_path} -> {folder}")
        for choice in choices:
            ui.say(f"  {choice}")
        with _ending_told(folder, run):
            return _run(recipe, folder, run, resume)


@contextmanager
def _ending_told(folder: Path, run: dict[str, Any]) -> Iterator[None]:
    """Record how the run ended; after an interruption say how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        run_folder.update(folder, run, status="interrupted")
        found = (each for each in checkpoints.every(folder, run["id"]) if isinstance(each, checkpoints.Checkpoint))
        step = next((each.step for each in found if each.resumable), 0)
        command = shlex.join(["lora", "train", str(folder / provenance.RESOLVED_RECIPE), "--resume"])
        ui.say(f"stopped; from step {step} it goes on with: {command}")
        raise
    except BaseException:
        with suppress(OSError):  # the disk may be what failed
            run_folder.update(folder, run, status="failed")
        raise


def _run(recipe: Recipe, folder: Path, run: dict[str, Any], resume: bool) -> Path:
    commit = run["base"]["commit"]
    tokenizer, new_ids, template = tokenizing.tokenizer_for(recipe, commit)
    ui.say(f"  chat template: {template}")
    size = plan.adapter(recipe, commit, tokenizer, new_ids)
    train_rows, eval_rows = data.load(recipe, tokenizer, date.fromisoformat(run["started"][:10]))
    ui.say(f"  data: {train_rows.summary()}")
    if eval_rows:
        ui.say(f"  evaluation: {eval_rows.summary()}")
    plan.refuse_unknown_ids(recipe, commit, train_rows, tokenizer)
    needed = disk.need(recipe, size.trainable, len(tokenizer), plan.steps(recipe, train_rows).steps)
    disk.check(folder, needed)
    _same_rows(folder, run, train_rows, tokenizer)
    with refusal.told(recipe):
        base = _base(recipe, commit)
        _attend(recipe, base, run)
        recipe = _suited(recipe, base)
        adapted = _adapted(recipe, base, commit, folder, tokenizer, new_ids, train_rows)

    def make() -> WatchedSFTTrainer | WatchedTrainer:
        return _trainer(recipe, folder, adapted, tokenizer, train_rows, eval_rows, run)

    with refusal.told(recipe):
        trainer = make()
    trainable, total = adapted.get_nb_trainable_parameters()
    layers = len(attach.lora_layers(adapted))
    ui.say(f"  adapter: {trainable:,} of {total:,} parameters trained, in {layers} modules")
    _say_packed(recipe, trainer, train_rows)
    started = time.monotonic()
    checkpoint = _checkpoint(folder, run["id"]) if resume else None
    with disk.told(folder, needed), refusal.told(recipe, lambda: trainer.watch.stepped):
        steps, mean_loss, effort = oom.through(trainer, make, checkpoint, recipe, train_rows, run)
    adapter = folder / "adapter"
    run |= {
        "status": "finished",
        "parameters": {"trainable": trainable, "total": total, "modules": layers},
        "results": {"steps": steps, "train_loss": mean_loss} | effort,
    }
    with disk.told(folder, needed):
        _save(adapted, tokenizer, adapter, run, folder / initial.START)
        run_folder.update(folder, run)
    ui.say(
        f"trained {steps} steps in {ui.duration(time.monotonic() - started)}, mean loss {mean_loss:.4f}; "
        f"adapter in {adapter}"
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
    run_folder.update(folder, run, data=now)


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
    finite.check(base, recipe.model.name_or_path)
    base.config.use_cache = False
    return base


def _attend(recipe: Recipe, base: PreTrainedModel, run: dict[str, Any]) -> None:
    """Attention by document where the recipe leaves it open and the base's own does not know documents."""
    if recipe.model.attn_implementation:
        return
    apart = attention.install(base)
    reason = "each document of a sequence by itself, the same for less time" if apart else "what the model has"
    choice = auto.Choice("model.attn_implementation", base.config._attn_implementation, reason)
    run["choices"] = [*(made for made in run["choices"] if made["name"] != choice.name), choice._asdict()]
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
    with attach.quiet_peft():
        initial.before_attaching(recipe, base, config, rows, collate)
        adapted = attach.attach_adapter(base, config, recipe.lora.autocast_adapter_dtype)
        initial.after_attaching(recipe, adapted, rows, collate, commit)
    initial.keep_start(recipe, adapted, folder)
    quick.install(adapted, adapted.device.type)
    if (options := upstream.compiling(recipe)) is not None:
        ui.say(f"  {quick.compile_layers(adapted, options)} layers are compiled at the first step")
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
    run: dict[str, Any],
) -> WatchedSFTTrainer | WatchedTrainer:
    """The trainer the recipe names, around the adapted model."""
    pieces = oom.pieces(recipe, run)
    arguments = upstream.training_arguments(oom.applied(recipe, pieces))
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
        common["data_collator"] = packing.StepCollator(pieces.sequence)
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
    trainer.watch, trainer.signals, trainer.run_id = Watch(folder), Signals(), run["id"]
    trainer.watch.limit, trainer.watch.where = recipe.training.stop_on_loss_above, trainer.step_in_words
    trainer.boundary = {} if recipe.training.on_oom == "reduce" else None
    trainer.keep, arguments.save_total_limit = recipe.training.save_total_limit, None
    trainer.dora_layers = dora.layers(adapted)
    trainer.watch.work = _work(recipe, adapted, train_rows)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer.watch)
    trainer.add_callback(Boundaries(trainer))
    return trainer


def _work(recipe: Recipe, adapted: PeftModel, train_rows: data.Prepared) -> flops.Work:
    """What training on one of these tokens costs, and what the device could do."""
    counts, device = train_rows.counts, hardware.here()
    context = counts.tokens / max(len(train_rows.rows), 1)
    each = flops.per_token(adapted, context, counts.trained_tokens / max(counts.tokens, 1))
    return flops.Work(each, flops.peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None)


def _checkpoint(folder: Path, run: str) -> Path | None:
    """The newest checkpoint that holds all that makes the continued run the same run; None for its beginning."""
    checkpoint = checkpoints.newest(folder, run)
    ui.say(f"  resuming from {checkpoint.folder}" if checkpoint else "  no checkpoint yet: from the first step")
    return checkpoint.folder if checkpoint else None


def _save(
    trained: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, run: dict[str, Any], start: Path
) -> None:
    """Write adapter, tokenizer, template, probes and record, whole or not at all; refuses what is not finite."""
    for name, parameter in attach.trainable(trained):
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name} is not finite: the adapter was not saved", "lower training.learning_rate")
    _make_room(adapter, run)
    with files.staged_folder(adapter) as staging:
        verify.save_trained(trained, tokenizer, staging)
        # no whole embeddings: those that changed are among the adapter's own tensors
        with attach.quiet_peft():
            trained.save_pretrained(str(staging), save_embedding_layers=False)
        initial.as_plain(staging, trained.peft_config["default"], start)
        tokenizing.save_tokenizer(tokenizer, staging, private.expanded(run["base"]["name"]), run["base"]["commit"])
        files.leave_out_home(staging)
        files.write_json(staging / provenance.ARTEFACT_RECORD, run)


def _make_room(adapter: Path, run: dict[str, Any]) -> None:
    """An adapter that this run saved already goes if it is of the same step (a kill came before the record said so);
    that of a run that was extended keeps its steps as part of its name."""
    if not (adapter / provenance.ARTEFACT_RECORD).is_file():
        return
    before = files.read_json(adapter / provenance.ARTEFACT_RECORD)
    if before.get("id") != run["id"]:
        return
    steps = before["results"]["steps"]
    if steps == run["results"]["steps"]:
        shutil.rmtree(adapter)
    else:
        adapter.rename(adapter.with_name(f"adapter-{steps}"))
        ui.say(f"  the adapter after {steps} steps is now {adapter.with_name(f'adapter-{steps}')}")
