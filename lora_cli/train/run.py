"""`lora train`: a recipe becomes an adapter.

Recipe -> settled values -> claimed folder -> rows -> base with a fresh adapter -> Trainer or
SFTTrainer -> adapter/.
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
    PreTrainedTokenizerBase,
)

from lora_cli.common import LoraError, files, privacy, provenance, translate_refusals, ui
from lora_cli.data import load, prepare, selection
from lora_cli.models import (
    Base,
    attach,
    init_weights,
    load_recipe_tokenizer,
    save_tokenizer,
    save_trained,
)
from lora_cli.plan import auto, hardware, memory, sizes
from lora_cli.recipe import Recipe
from lora_cli.train import checkpoints, disk_space, lock, out_of_memory, run_folder, setup
from lora_cli.train.progress import NonFiniteError
from lora_cli.train.trainers import WatchedSFTTrainer, WatchedTrainer


def train(recipe: Recipe, resume: bool = False, allowed: Sequence[str] = ()) -> Path:
    """Run the recipe and return the adapter's folder. The run's record says how it ended, whatever
    happens.

    With `resume` the run in the recipe's folder goes on from its newest checkpoint; of the recipe,
    the keys `allowed` may have changed.
    """
    auto.try_configurations(recipe)
    base = Base.of_recipe(recipe)
    device = hardware.detect_device()
    recipe, choices = auto.settle(recipe, base.dtype, device, memory.levers(base.config, device))
    folder = Path(recipe.output_dir)
    contents = {
        "choices": [choice._asdict() for choice in choices],
        "base": {"name": base.name, "commit": base.revision, "fingerprint": base.fingerprint},
    }
    run_folder.refuse_foreign_folder(folder)
    if resume and not folder.is_dir():
        raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
    files.make_folder(folder)
    with lock.hold_folder(folder):
        checkpoints.remove_leftovers(folder)
        run = run_folder.begin_run(folder, recipe.to_data(), contents, resume, allowed)
        ui.say(f"{recipe.method} on {recipe.model.name_or_path} -> {folder}")
        for choice in choices:
            ui.say(f"  {choice}")
        with _record_ending(folder, run):
            return _run(recipe, base, folder, run, resume)


@contextmanager
def _record_ending(folder: Path, run: dict[str, Any]) -> Iterator[None]:
    """Record how the run ended; after an interruption say how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        run_folder.update_record(folder, run, status="interrupted")
        found = (
            each
            for each in checkpoints.walk_checkpoints(folder, run["id"])
            if isinstance(each, checkpoints.Checkpoint)
        )
        step = next((each.step for each in found if each.resumable), 0)
        command = shlex.join(
            ["lora", "train", str(folder / provenance.RESOLVED_RECIPE), "--resume"]
        )
        ui.say(f"stopped; from step {step} it goes on with: {command}")
        raise
    except BaseException:
        with suppress(OSError):  # the disk may be what failed
            run_folder.update_record(folder, run, status="failed")
        raise


def _run(recipe: Recipe, base: Base, folder: Path, run: dict[str, Any], resume: bool) -> Path:
    passed_on = recipe.list_passed_on()
    tokenizer, new_ids, template = load_recipe_tokenizer(recipe, base)
    ui.say(f"  chat template: {template}")
    size = sizes.measure_adapter(recipe, base, tokenizer, new_ids)
    train_rows, eval_rows = load.load_rows(
        recipe, tokenizer, date.fromisoformat(run["started"][:10])
    )
    ui.say(f"  data: {train_rows.summarise()}")
    if eval_rows:
        ui.say(f"  evaluation: {eval_rows.summarise()}")
    sizes.refuse_unknown_ids(recipe, base, train_rows, tokenizer)
    needed = disk_space.estimate_need(
        recipe, size.trainable, len(tokenizer), sizes.count_steps(recipe, train_rows).steps
    )
    disk_space.refuse_too_little(folder, needed)
    _refuse_other_rows(folder, run, train_rows, tokenizer)
    with translate_refusals(passed_on):
        network = setup.load_recipe_base(recipe, base)
        setup.set_attention(recipe, network, run)
        recipe = setup.settle_packing(recipe, network)
        adapted = setup.attach_adapter(
            recipe, base, network, folder, tokenizer, new_ids, train_rows
        )

    def make() -> WatchedSFTTrainer | WatchedTrainer:
        return setup.make_trainer(recipe, folder, adapted, tokenizer, train_rows, eval_rows, run)

    with translate_refusals(passed_on):
        trainer = make()
    trainable, total = adapted.get_nb_trainable_parameters()
    layers = len(attach.find_lora_layers(adapted))
    ui.say(f"  adapter: {trainable:,} of {total:,} parameters trained, in {layers} modules")
    _say_packed(recipe, trainer, train_rows)
    started = time.monotonic()
    checkpoint = _find_checkpoint(folder, run["id"]) if resume else None
    with (
        disk_space.translate_full_disk(folder, needed),
        translate_refusals(passed_on, lambda: trainer.watch.stepped),
    ):
        steps, mean_loss, effort = out_of_memory.train_through(
            trainer, make, checkpoint, recipe, train_rows, run
        )
    adapter = folder / "adapter"
    run |= {
        "status": "finished",
        "parameters": {"trainable": trainable, "total": total, "modules": layers},
        "results": {"steps": steps, "train_loss": mean_loss} | effort,
    }
    with disk_space.translate_full_disk(folder, needed):
        _save(adapted, tokenizer, adapter, run, folder / init_weights.START)
        run_folder.update_record(folder, run)
    ui.say(
        f"trained {steps} steps in {ui.format_duration(time.monotonic() - started)}, mean loss "
        f"{mean_loss:.4f}; "
        f"adapter in {adapter}"
    )
    return adapter


def _say_packed(
    recipe: Recipe, trainer: WatchedSFTTrainer | WatchedTrainer, train_rows: prepare.Prepared
) -> None:
    """How full TRL's packing made the sequences."""
    if recipe.training.packing in (True, "dataset") and train_rows.stream is None:
        packed = len(trainer.train_dataset)
        fill = train_rows.counts.tokens / (packed * trainer.args.max_length)
        ui.say(
            f"  packed: {len(train_rows.rows)} rows in {packed} of {trainer.args.max_length} "
            f"tokens, {fill:.0%} full"
        )


def _describe_rows(rows: prepare.Prepared, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a run's record keeps of the rows it trained on."""
    return {
        "fingerprint": rows.fingerprint,
        "commit": rows.commit,
        "read": rows.counts.read,
        "rows": len(rows.rows),
        "tokens": rows.counts.tokens,
        "trained_tokens": rows.counts.trained_tokens,
        "left_out": dict(rows.counts.left_out),
        "stop_token_ids": selection.find_stop_ids(tokenizer, rows.counts),
        "streamed": rows.stream is not None,
    }


def _refuse_other_rows(
    folder: Path,
    run: dict[str, Any],
    train_rows: prepare.Prepared,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Record what is trained on, before it is; LoraError when a resumed run began with other
    rows."""
    before, now = run.get("data"), _describe_rows(train_rows, tokenizer)
    if before and before["fingerprint"] != now["fingerprint"]:
        raise LoraError(
            f"the run in {folder} began with other rows: the data, tokenizer or chat template "
            "have changed since",
            "undo the change; record.json says what they were",
        )
    run_folder.update_record(folder, run, data=now)


def _find_checkpoint(folder: Path, run: str) -> Path | None:
    """The newest checkpoint that holds all that makes the continued run the same run; None for its
    beginning."""
    checkpoint = checkpoints.find_newest(folder, run)
    ui.say(
        f"  resuming from {checkpoint.folder}"
        if checkpoint
        else "  no checkpoint yet: from the first step"
    )
    return checkpoint.folder if checkpoint else None


def _save(
    trained: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
    run: dict[str, Any],
    start: Path,
) -> None:
    """Write adapter, tokenizer, template, probes and record, whole or not at all; refuses what is
    not finite."""
    for name, parameter in attach.walk_trainable(trained):
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"{name} is not finite: the adapter was not saved", "lower training.learning_rate"
            )
    _make_room(adapter, run)
    with files.staged_folder(adapter) as staging:
        save_trained(trained, tokenizer, staging)
        # no whole embeddings: those that changed are among the adapter's own tensors
        with attach.quiet_peft():
            trained.save_pretrained(str(staging), save_embedding_layers=False)
        init_weights.save_as_plain(staging, trained.peft_config["default"], start)
        save_tokenizer(
            tokenizer, staging, privacy.expand_home(run["base"]["name"]), run["base"]["commit"]
        )
        files.leave_out_home(staging)
        files.write_json(staging / provenance.ARTEFACT_RECORD, run)


def _make_room(adapter: Path, run: dict[str, Any]) -> None:
    """An adapter that this run saved already goes if it is of the same step (a kill came before the
    record said so); that of a run that was extended keeps its steps as part of its name."""
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
