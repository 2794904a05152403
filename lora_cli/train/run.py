"""`lora train`: a recipe becomes an adapter.

Recipe -> settled values -> claimed folder -> rows -> base with a fresh adapter -> Trainer or
SFTTrainer -> adapter/.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_cli import __version__
from lora_cli.card import write_card
from lora_cli.common import (
    LoraError,
    endings,
    files,
    gpu_faults,
    lock,
    plain_files,
    provenance,
    spell_count,
    threads,
    translate_refusals,
    ui,
)
from lora_cli.data import prepare as rows
from lora_cli.distributed import place, ranks
from lora_cli.models import (
    Base,
    Reader,
    TrainingRecord,
    attach,
    init_weights,
    save_head_config,
    save_reader,
    save_trained,
)
from lora_cli.plan import hardware, settled, spread
from lora_cli.recipe import Recipe
from lora_cli.train import (
    adapted_base,
    checkpoints,
    disk_space,
    out_of_memory,
    outcome,
    packing,
    random_state,
    receipt,
    run_folder,
    setup,
    sharding,
    trial,
    zero3,
)
from lora_cli.train.inputs import Inputs, add_references, prepare_inputs
from lora_cli.train.run_folder import Run
from lora_cli.train.step_numbers import NonFiniteError
from lora_cli.train.trainers import Watched


def train(recipe: Recipe, resume: bool = False, allowed: Sequence[str] = ()) -> Path:
    """Run the recipe and return the adapter's folder.

    Whatever happens, the run's record says how it ended. With `resume` the run in the recipe's
    folder goes on from its newest checkpoint; of the recipe, the keys `allowed` may have changed.
    Of several processes the first one settles and claims; the others take what it has found.
    """
    if not ranks.is_first():
        return _follow(recipe, resume)
    with ranks.told():
        found, contents = _settle(recipe, resume, ranks.count())
    folder = Path(recipe.output_dir)
    with files.made_folder(folder), lock.hold_folder(folder):
        files.remove_leftovers(folder)
        settled_recipe = found.recipe.to_data()
        allowed = run_folder.list_allowed(recipe, resume, allowed)
        with ranks.told():
            draft = run_folder.draft_run(folder, settled_recipe, contents, resume, allowed)
            _say_settled(found, folder)
            # what refuses to go on leaves the run's record and recipe as they were
            inputs = _prepare_inputs(found, draft) if resume else None
        run = run_folder.begin_run(draft)
        with _record_ending(run):
            if found.parent is not None:
                found.parent.keep(folder)
            ranks.begin(
                {
                    "given": _digest(recipe.to_data()),
                    "base": _digest(found.base.fingerprint),
                    "recipe": found.recipe.to_data(),
                    "record": run.record.to_data(),
                }
            )
            return _run(found, run, resume, inputs)


def prepare(recipe: Recipe, resume: bool, allowed: Sequence[str], nodes: place.Nodes) -> None:
    """Do what a run does before it claims its folder and loads the base, for the processes that are
    to train together: what can be refused is refused, and the rows are in the cache.

    The folder is not made: other machines that share its disk may be doing the same. The run that
    goes on may lie on another machine's.
    """
    folder = Path(recipe.output_dir)
    if nodes.machines > 1 and not (folder / provenance.RUN_RECORD).is_file():
        resume, allowed = False, ()
    processes = nodes.processes * nodes.machines
    found, contents = _settle(recipe, resume, processes)
    _say_settled(found, folder)
    allowed = run_folder.list_allowed(recipe, resume, allowed)
    run = run_folder.draft_run(folder, found.recipe.to_data(), contents, resume, allowed)
    with translate_refusals(found.recipe.list_passed_on()):
        _prepare_inputs(found, run)


def change_before_again(recipe: Recipe, asked: dict[str, Any]) -> None:
    """Change the run as one of its processes has asked before all ended, to be started again."""
    folder = Path(recipe.output_dir)
    with lock.hold_folder(folder):
        run = Run(folder, TrainingRecord.read(folder / provenance.RUN_RECORD))
        out_of_memory.make_smaller(run, checkpoints.find_last_step(folder, run.id), asked)


def _settle(recipe: Recipe, resume: bool, processes: int) -> tuple[settled.Settled, dict[str, Any]]:
    """Return the recipe settled for `processes`, and what the run's record says of how."""
    by_deepspeed = processes > 1 and recipe.distributed.strategy == "deepspeed-zero3"
    if by_deepspeed:
        zero3.refuse_absence(recipe)
    if not recipe.trains_on_cpu:
        gpu_faults.check_gpu(recipe.quantized)
    trial.try_training(recipe)
    folder = Path(recipe.output_dir)
    if resume:
        plain_files.refuse_odd_files(folder)
    found = settled.settle_recipe(recipe, run=folder if resume else None, processes=processes)
    spread.refuse_misfit(found.recipe, processes)
    if not found.base.task.writes_next_tokens and processes > 1:
        spread.refuse_statistics(found.base.build_empty(), processes)
    base, parent = found.base, found.parent
    if by_deepspeed:
        zero3.refuse_experts(recipe, base.build_empty())
    contents = {
        "choices": [choice._asdict() for choice in found.choices],
        "base": base.to_record(),
        **({"parent": parent.to_record()} if parent else {}),
    }
    run_folder.refuse_foreign_folder(folder)
    if resume and not folder.is_dir():
        raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
    return found, contents


def _say_settled(found: settled.Settled, folder: Path) -> None:
    ui.say(f"{found.recipe.method} on {found.base.describe()} -> {folder}")
    for line in found.list_lines():
        ui.say(f"  {line}")


def _digest(given: Any) -> str:
    """Return what tells JSON's values, and the version of this program, from others."""
    text = json.dumps([__version__, given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _follow(recipe: Recipe, resume: bool) -> Path:
    """Train with what the first process has found. LoraError where this one was given, or has here,
    something else."""
    if recipe.distributed.strategy == "deepspeed-zero3":  # on this machine, too
        zero3.refuse_absence(recipe)
    begun = ranks.follow()
    hint = "start the same lora with the same recipe and files on each machine"
    if begun["given"] != _digest(recipe.to_data()):
        raise LoraError("this process has another recipe or lora than the first one", hint)
    folder = Path(recipe.output_dir)
    record = TrainingRecord.model_validate(begun["record"])
    settled_there = Recipe.model_validate(begun["recipe"])
    found = settled.settle_recipe(settled_there, run=folder if resume else None)
    if begun["base"] != _digest(found.base.fingerprint):
        raise LoraError(f"the base {found.base.name} here is another than the first one's", hint)
    return _run(found, Run(folder, record, written=False), resume)


@contextmanager
def _record_ending(run: Run) -> Iterator[None]:
    """Record how the run ended; after an interruption say how to go on."""
    try:
        with endings.say_at_signal(lambda: _record_interruption(run)):
            yield
    except (KeyboardInterrupt, SystemExit):  # after the step that a signal came in
        _record_interruption(run)
        raise
    except BaseException:
        with suppress(OSError):  # the disk may be what failed
            run.update(status="failed")
        raise


def _record_interruption(run: Run) -> None:
    run.update(status="interrupted")
    step = checkpoints.find_last_step(run.folder, run.id)
    ui.say(f"stopped; from step {step} it goes on with: {receipt.write_resumption(run.folder)}")


def _prepare_inputs(found: settled.Settled, run: Run) -> Inputs:
    return prepare_inputs(found.recipe, found.base, found.parent, run)


def _run(found: settled.Settled, run: Run, resume: bool, prepared: Inputs | None = None) -> Path:
    recipe, base = found.recipe, found.base
    passed_on = recipe.list_passed_on()
    with ranks.told(), ranks.in_turn():
        inputs = prepared or _prepare_inputs(found, run)
    with translate_refusals(passed_on):
        recipe, adapted = load_adapted(recipe, base, run, inputs)
        inputs = add_references(recipe, base, adapted, inputs)
    make = partial(setup.make_trainer, recipe, adapted, inputs, run)
    with translate_refusals(passed_on):
        trainer = make()
    if ranks.count() > 1:
        random_state.seed_apart(recipe.training.seed)
        run.add(processes=ranks.count())
    parameters = _count_parameters(adapted)
    _say_packed(recipe, trainer, inputs.train_rows)
    began = threads.look()
    checkpoint = _find_checkpoint(run, recipe) if resume and ranks.is_first() else None
    checkpoint = ranks.share(checkpoint)
    with (
        disk_space.translate_full_disk(run.folder, inputs.disk),
        translate_refusals(passed_on, lambda: trainer.watch.stepped),
        checkpoints.fetched(checkpoint, run.id) as begun,
    ):
        trained = out_of_memory.train_through(trainer, make, begun, recipe, inputs.train_rows, run)
    chosen = trainer.args.load_best_model_at_end  # the first steps may have been the best
    _judge_untrained(adapted, trainer.watch.had_rate and not chosen)
    adapter = run.folder / "adapter"
    seconds = _measure_duration(began)
    run.add(status="finished", parameters=parameters, results=_list_results(trained, seconds))
    if ranks.is_first():
        _say_kept(run, trained, recipe.training.tells_best)
    with disk_space.translate_full_disk(run.folder, inputs.disk):
        _save_once(adapted, inputs, adapter, run)
    _say_trained(run, trained, seconds)
    ui.say(*receipt.list_lines(run.folder, run.record, recipe, trained.seen))
    return adapter


def _list_results(trained: outcome.Trained, seconds: float) -> dict[str, Any]:
    """Return what a run's record says of how it ended."""
    results = {"steps": trained.steps, "train_loss": trained.mean_loss}
    return results | {"duration_s": round(seconds, 3)} | trained.effort


def _say_trained(run: Run, trained: outcome.Trained, seconds: float) -> None:
    took = ui.format_duration(seconds)
    took = f", {took} since it was resumed" if run.record.resumed else f" in {took}"
    said = f"trained {spell_count(trained.steps, 'step')}{took}, mean loss {trained.mean_loss:.4f}"
    ui.say(f"{said}; adapter in {run.folder / 'adapter'}")


def _say_kept(run: Run, trained: outcome.Trained, choosing: bool) -> None:
    """Say, and note, which step becomes the adapter, where evaluations tell steps apart; warn where
    they were to, by `choosing`, and there were none."""
    kept = outcome.find_kept(run.folder, trained)
    if kept is not None:
        ui.say(*outcome.list_lines(kept))
        run.add(kept=kept.to_data())
    elif choosing:
        ui.warn("nothing was evaluated: the last step is kept, as none can be told to be better")


def _count_parameters(adapted: PeftModel) -> dict[str, int]:
    """Return, and say, how much is trained."""
    trainable, total = adapted.get_nb_trainable_parameters()
    modules = len(attach.find_lora_layers(adapted))
    ui.say(
        f"  adapter: {trainable:,} of {spell_count(format(total, ','), 'parameter')} trained, in "
        f"{spell_count(modules, 'module')}"
    )
    return {"trainable": trainable, "total": total, "modules": modules}


def load_adapted(recipe: Recipe, base: Base, run: Run, inputs: Inputs) -> tuple[Recipe, PeftModel]:
    """Return the base with the adapter that is to be trained, and the recipe as that base allows
    it."""
    network = adapted_base.load_recipe_base(recipe, base)
    device = hardware.detect_device(network.device)
    run.update(device={"kind": device.kind, "name": device.name})
    recipe = packing.settle_packing(packing.fit_positions(recipe, base, run), network, run)
    return recipe, adapted_base.attach_adapter(recipe, base, network, run, inputs)


def _judge_untrained(adapted: PeftModel, learnt: bool) -> None:
    """Warn of adapted modules that training has left as they were; LoraError where that is all of
    what was to be trained though something must have been `learnt`."""
    untrained = attach.find_untrained(adapted, sharding.gather)
    layers = attach.find_lora_layers(adapted)
    if not untrained:
        return
    factors = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
    only_factors = all(
        any(part in name for part in factors) for name, _ in attach.walk_trainable(adapted)
    )
    if len(untrained) == len(layers) and only_factors and learnt:
        raise LoraError(
            "every B is still zero: the adapter would change nothing, and was not saved",
            "look whether anything passes through what lora.target_modules names",
        )
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in untrained))
    why = "their B is zero: nothing passed through them, or no step had a learning rate"
    ui.warn(f"{len(untrained)} of {len(layers)} adapted modules were not trained ({kinds}): {why}")


def _measure_duration(began: threads.Moment) -> float:
    """Return the seconds since `began`; warn where other work made them more."""
    ended = threads.look()
    slow = threads.explain_slowness(began, ended, torch.get_num_threads())
    if slow and not torch.cuda.is_available():
        ui.warn(slow)
    return ended.clock - began.clock


def _say_packed(recipe: Recipe, trainer: Watched, train_rows: rows.Prepared) -> None:
    """Say how full TRL's packing made the sequences."""
    if recipe.training.packing in (True, "dataset") and train_rows.stream is None:
        packed = len(trainer.train_dataset)
        length = trainer.args.max_length
        fill = train_rows.counts.tokens / (packed * length)
        ui.say(
            f"  packed: {spell_count(len(train_rows.rows), 'row')} in {packed} of "
            f"{spell_count(length, 'token')}, {fill:.0%} full"
        )


def _find_checkpoint(run: Run, recipe: Recipe) -> Path | None:
    """Return the newest checkpoint to resume from; None to begin at the first step."""
    keeps_best = recipe.training.keep == "best"
    checkpoint = checkpoints.find_newest(run.folder, run.id, keeps_best)
    ui.say(
        f"  resuming from {checkpoint.folder}"
        if checkpoint
        else "  no checkpoint yet: from the first step"
    )
    return checkpoint.folder if checkpoint else None


def _save_once(trained: PeftModel, inputs: Inputs, adapter: Path, run: Run) -> None:
    """Let the first process save; where weights are sharded, the others take part in gathering
    them."""
    if ranks.is_first():
        _save(trained, inputs.reader, adapter, run)
        run.save()
    elif sharding.is_on(trained):
        with files.scratch_folder() as scratch:
            _save(trained, inputs.reader, scratch / "adapter", run)


def _save(trained: PeftModel, reader: Reader, adapter: Path, run: Run) -> None:
    """Write adapter, tokenizer and template or image processor, probes and record, whole or not at
    all.

    NonFiniteError where a trained tensor holds NaN or infinity.
    """
    for name, parameter in attach.walk_trainable(trained):
        if not torch.isfinite(sharding.gather(parameter)).all():
            raise NonFiniteError(
                f"{name} is not finite: the adapter was not saved", "lower training.learning_rate"
            )
    _make_room(adapter, run)
    with files.staged_folder(adapter) as staging:
        save_trained(trained, reader, staging)
        # no whole embeddings: those that changed are among the adapter's own tensors
        with attach.quiet_peft():
            trained.save_pretrained(
                str(staging),
                save_embedding_layers=False,
                state_dict=sharding.gather_trained(trained) if sharding.is_on(trained) else None,
            )
        init_weights.save_as_plain(
            staging, trained.peft_config["default"], run.folder / init_weights.START
        )
        save_reader(reader, staging, run.record.base.place, run.record.base.commit)
        save_head_config(trained.get_base_model(), staging)
        files.leave_out_home(staging)
        files.write_json(staging / provenance.ARTEFACT_RECORD, run.record.to_data())
        write_card(staging, files.name_artefact(adapter))


def _make_room(adapter: Path, run: Run) -> None:
    """Move an adapter that this run saved already out of the way.

    One of the same step is removed: the run was killed before its record said that it had ended.
    One of fewer steps, from before the run was extended, gets them as part of its name.
    """
    if not (adapter / provenance.ARTEFACT_RECORD).is_file():
        return
    before, now = TrainingRecord.read(adapter / provenance.ARTEFACT_RECORD), run.record
    if before.id != run.id or before.results is None or now.results is None:
        return
    steps = before.results.steps
    if steps == now.results.steps:
        shutil.rmtree(adapter)
    else:
        adapter.rename(adapter.with_name(f"adapter-{steps}"))
        ui.say(
            f"  the adapter after {spell_count(steps, 'step')} is now "
            f"{adapter.with_name(f'adapter-{steps}')}"
        )
