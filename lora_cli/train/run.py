"""`lora train`: a recipe becomes an adapter.

Recipe -> settled values -> claimed folder -> rows -> base with a fresh adapter -> Trainer or
SFTTrainer -> adapter/.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_cli.common import (
    LoraError,
    files,
    gpu_faults,
    provenance,
    threads,
    translate_refusals,
    ui,
)
from lora_cli.data import prepare
from lora_cli.models import Base, attach, init_weights, save_tokenizer, save_trained
from lora_cli.plan import hardware, settled
from lora_cli.recipe import Recipe
from lora_cli.train import checkpoints, disk_space, lock, out_of_memory, run_folder, setup, trial
from lora_cli.train.progress import NonFiniteError
from lora_cli.train.run_folder import Run
from lora_cli.train.trainers import Watched


def train(recipe: Recipe, resume: bool = False, allowed: Sequence[str] = ()) -> Path:
    """Run the recipe and return the adapter's folder.

    Whatever happens, the run's record says how it ended. With `resume` the run in the recipe's
    folder goes on from its newest checkpoint; of the recipe, the keys `allowed` may have changed.
    """
    if not recipe.training.collect_values().get("use_cpu"):
        gpu_faults.check_gpu(recipe.quantized)
    trial.try_training(recipe)
    folder = Path(recipe.output_dir)
    found = settled.settle_recipe(recipe, run=folder if resume else None)
    base, parent = found.base, found.parent
    contents = {
        "choices": [choice._asdict() for choice in found.choices],
        "base": {"name": base.name, "commit": base.revision, "fingerprint": base.fingerprint},
        **({"parent": parent.to_record()} if parent else {}),
    }
    run_folder.refuse_foreign_folder(folder)
    if resume and not folder.is_dir():
        raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
    files.make_folder(folder)
    with lock.hold_folder(folder):
        checkpoints.remove_leftovers(folder)
        run = run_folder.begin_run(folder, found.recipe.to_data(), contents, resume, allowed)
        with _record_ending(run):
            ui.say(f"{found.recipe.method} on {base.describe()} -> {folder}")
            for line in found.list_lines():
                ui.say(f"  {line}")
            if parent is not None:
                parent.keep(folder)
            return _run(found, run, resume)


@contextmanager
def _record_ending(run: Run) -> Iterator[None]:
    """Record how the run ended; after an interruption say how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM
        run.update(status="interrupted")
        step = checkpoints.find_last_step(run.folder, run.id)
        resolved = run.folder / provenance.RESOLVED_RECIPE
        command = shlex.join(["lora", "train", str(resolved), "--resume"])
        ui.say(f"stopped; from step {step} it goes on with: {command}")
        raise
    except BaseException:
        with suppress(OSError):  # the disk may be what failed
            run.update(status="failed")
        raise


def _run(found: settled.Settled, run: Run, resume: bool) -> Path:
    recipe, base = found.recipe, found.base
    passed_on = recipe.list_passed_on()
    inputs = setup.prepare_inputs(recipe, base, found.parent, run)
    with translate_refusals(passed_on):
        recipe, adapted = _load_adapted(recipe, base, run, inputs)

    def make() -> Watched:
        return setup.make_trainer(recipe, adapted, inputs, run)

    with translate_refusals(passed_on):
        trainer = make()
    trainable, total = adapted.get_nb_trainable_parameters()
    modules = len(attach.find_lora_layers(adapted))
    ui.say(f"  adapter: {trainable:,} of {total:,} parameters trained, in {modules} modules")
    _say_packed(recipe, trainer, inputs.train_rows)
    began = threads.look()
    checkpoint = _find_checkpoint(run) if resume else None
    with (
        disk_space.translate_full_disk(run.folder, inputs.disk),
        translate_refusals(passed_on, lambda: trainer.watch.stepped),
    ):
        steps, mean_loss, effort = out_of_memory.train_through(
            trainer, make, checkpoint, recipe, inputs.train_rows, run
        )
    _warn_of_untrained(adapted)
    adapter = run.folder / "adapter"
    run.add(
        status="finished",
        parameters={"trainable": trainable, "total": total, "modules": modules},
        results={"steps": steps, "train_loss": mean_loss} | effort,
    )
    with disk_space.translate_full_disk(run.folder, inputs.disk):
        _save(adapted, inputs.tokenizer, adapter, run)
        run.save()
    duration = _measure_duration(began)
    ui.say(f"trained {steps} steps in {duration}, mean loss {mean_loss:.4f}; adapter in {adapter}")
    return adapter


def _load_adapted(
    recipe: Recipe, base: Base, run: Run, inputs: setup.Inputs
) -> tuple[Recipe, PeftModel]:
    """Return the base with the adapter that is to be trained, and the recipe as that base allows
    it."""
    network = setup.load_recipe_base(recipe, base)
    device = hardware.detect_device(network.device)
    run.update(device={"kind": device.kind, "name": device.name})
    recipe = setup.settle_packing(setup.fit_positions(recipe, base, run), network, run)
    return recipe, setup.attach_adapter(recipe, base, network, run, inputs)


def _warn_of_untrained(adapted: PeftModel) -> None:
    """Warn of adapted modules that training has left as they were."""
    untrained, total = attach.find_untrained(adapted), len(attach.find_lora_layers(adapted))
    if not untrained:
        return
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in untrained))
    why = "their B is zero: nothing passed through them, or no step had a learning rate"
    ui.warn(f"{len(untrained)} of {total} adapted modules were not trained ({kinds}): {why}")


def _measure_duration(began: threads.Moment) -> str:
    """Return in words how long it was since `began`; warn where other work made it longer."""
    ended = threads.look()
    slow = threads.explain_slowness(began, ended, torch.get_num_threads())
    if slow and not torch.cuda.is_available():
        ui.warn(slow)
    return ui.format_duration(ended.clock - began.clock)


def _say_packed(recipe: Recipe, trainer: Watched, train_rows: prepare.Prepared) -> None:
    """Say how full TRL's packing made the sequences."""
    if recipe.training.packing in (True, "dataset") and train_rows.stream is None:
        packed = len(trainer.train_dataset)
        length = trainer.args.max_length
        fill = train_rows.counts.tokens / (packed * length)
        ui.say(
            f"  packed: {len(train_rows.rows)} rows in {packed} of {length} tokens, {fill:.0%} full"
        )


def _find_checkpoint(run: Run) -> Path | None:
    """Return the newest checkpoint to resume from; None to begin at the first step."""
    checkpoint = checkpoints.find_newest(run.folder, run.id)
    ui.say(
        f"  resuming from {checkpoint.folder}"
        if checkpoint
        else "  no checkpoint yet: from the first step"
    )
    return checkpoint.folder if checkpoint else None


def _save(trained: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, run: Run) -> None:
    """Write adapter, tokenizer, template, probes and record, whole or not at all.

    NonFiniteError where a trained tensor holds NaN or infinity.
    """
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
        _name_parent(staging / "README.md", run)
        init_weights.save_as_plain(
            staging, trained.peft_config["default"], run.folder / init_weights.START
        )
        save_tokenizer(tokenizer, staging, run.base_name, run.commit)
        files.leave_out_home(staging)
        files.write_json(staging / provenance.ARTEFACT_RECORD, run.record)


def _name_parent(card: Path, run: Run) -> None:
    """Add to PEFT's model card which adapter this one was trained on from."""
    if parent := run.record.get("parent"):
        said = f"Trained on from the adapter `{parent['name']}` (sha256 `{parent['sha256']}`)."
        files.write_text(card, f"{card.read_text(encoding='utf-8')}\n\n{said}\n")


def _make_room(adapter: Path, run: Run) -> None:
    """Move an adapter that this run saved already out of the way.

    One of the same step is removed: the run was killed before its record said that it had ended.
    One of fewer steps, from before the run was extended, gets them as part of its name.
    """
    if not (adapter / provenance.ARTEFACT_RECORD).is_file():
        return
    before = files.read_json(adapter / provenance.ARTEFACT_RECORD)
    if before.get("id") != run.id:
        return
    steps = before["results"]["steps"]
    if steps == run.record["results"]["steps"]:
        shutil.rmtree(adapter)
    else:
        adapter.rename(adapter.with_name(f"adapter-{steps}"))
        ui.say(f"  the adapter after {steps} steps is now {adapter.with_name(f'adapter-{steps}')}")
