"""Claim a run's folder, write its record, refuse a resumed run whose recipe has changed."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import (
    LoraError,
    privacy,
    provenance,
    quote,
    refuse_link,
    refuse_occupied,
    spell_count,
    ui,
    write_json,
    write_text,
)
from lora_cli.models import PARENT_COPY, TrainingRecord
from lora_cli.plan import auto_choices, settled
from lora_cli.recipe import Recipe, strict_yaml
from lora_cli.train import checkpoints, saved_state

EXTENDING = (
    "training.max_steps",
    "training.num_train_epochs",
    "training.eval_strategy",
    "training.eval_steps",
    "training.per_device_eval_batch_size",
    "training.dataloader_num_workers",
    "training.keep",
    "training.early_stopping_patience",
    "training.early_stopping_threshold",
    "training.max_grad_norm",
    "data.eval_path",
    "data.eval_split",
    "training.logging_steps",
    "training.logging_strategy",
    "training.logging_first_step",
    "training.report_to",
    "training.run_name",
    "training.save_steps",
    "training.save_strategy",
    "training.save_total_limit",
    "training.on_oom",
    "training.stop_on_loss_above",
    "training.sample_prompts",
    "training.sample_tokens",
    "distributed.strategy",
)
"""Keys that may change when a run is resumed: the steps so far do not depend on them."""


WRITTEN = (
    *(provenance.RUN_RECORD, provenance.RESOLVED_RECIPE, provenance.METRICS),
    *(provenance.SAMPLES, provenance.REPORT, provenance.REPORT_NUMBERS),
)
"""Files that a run may have before its first checkpoint."""


def refuse_foreign_folder(folder: Path) -> None:
    """Raise LoraError where `folder` holds something that is not a run of ours.

    What is left of a run that was killed as it started may stay.
    """
    refuse_link(folder)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        leftovers = {name for name in names if re.fullmatch(r"\.lock|\..+\.tmp", name)}
        if provenance.RUN_RECORD in names or (names and names == leftovers):
            return
    refuse_occupied(folder)


@dataclass(frozen=True)
class Run:
    """A run's folder and its record, which `save` writes to `record.json` there."""

    folder: Path
    record: TrainingRecord
    written: bool = True
    """False in processes that others write the record for, and before a run has begun."""

    @property
    def id(self) -> str:
        """The name by which checkpoints and adapters know their run."""
        return str(self.record.id)

    def add(self, **contents: Any) -> None:
        """Add to the record, or replace what it has under these names, without writing it."""
        for name, value in privacy.make_portable(contents).items():
            setattr(self.record, name, value)

    def save(self) -> None:
        """Write the record."""
        if not self.written:
            return
        self.add(updated=provenance.now())
        write_json(self.folder / provenance.RUN_RECORD, self.record.to_data())

    def update(self, **contents: Any) -> None:
        """Add to the record and write it."""
        self.add(**contents)
        self.save()

    def add_reduction(self, step: int, pieces: dict[str, int]) -> None:
        """Note, and write, that memory ran out after a step, and the pieces it goes on with."""
        earlier = [reduction.to_data() for reduction in self.record.reduced]
        self.update(reduced=[*earlier, {"step": step, "pieces": pieces}])

    def has_choice(self, name: str) -> bool:
        """Return whether `auto` chose the value of a key."""
        return any(made.name == name for made in self.record.choices)

    def replace_choice(self, choice: auto_choices.Choice) -> None:
        """Put a choice in the place of an earlier one for its key, without writing the record."""
        others = [made.to_data() for made in self.record.choices if made.name != choice.name]
        self.add(choices=[*others, choice._asdict()])


def list_allowed(recipe: Recipe, resume: bool, allowed: Sequence[str]) -> list[str]:
    """Return the keys that a resumed run may change: those that are `allowed`, and what --set gives
    of those that can be."""
    given = recipe.list_overridden() if resume else []
    return [*allowed, *(key for key in given if key in EXTENDING)]


def begin_run(draft: Run) -> Run:
    """Claim the folder, which is locked, for a run that is drafted: its record is written with
    status `running`."""
    folder, record = draft.folder, draft.record
    if not record.resumed and (folder / provenance.RUN_RECORD).is_file():
        _clear_failed(folder)
    write_json(folder / provenance.RUN_RECORD, record.to_data())
    write_text(folder / provenance.RESOLVED_RECIPE, strict_yaml.dump(record.recipe.to_data()))
    return replace(draft, written=True)


def draft_run(
    folder: Path,
    recipe: dict[str, Any],
    contents: dict[str, Any],
    resume: bool,
    allowed: Sequence[str] = (),
) -> Run:
    """Return the run of the resolved `recipe` in `folder`, of which nothing is written yet.

    LoraError when the folder holds another run, or, with `resume`, a run of a recipe that differs
    in more than the `allowed` keys.
    """
    refuse_link(folder)
    recipe = privacy.make_portable(recipe)
    contents = privacy.make_portable(contents)
    path = folder / provenance.RUN_RECORD
    kept: dict[str, Any] = {}
    if resume:
        if not path.is_file():
            raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
        before = TrainingRecord.read(path)
        if (made := folder / "adapter" / provenance.ARTEFACT_RECORD).is_file():
            TrainingRecord.read(made)  # which is asked for when the run ends
        found = _list_differences(settled.read_recorded(folder), recipe)
        changes = [each for each in found if not _is_chosen_anew(each, contents)]
        _refuse_other_run(folder, before, recipe, changes, contents, allowed)
        kept = _keep_from_before(before, changes)
    elif path.is_file():
        _refuse_begun(folder)
    record = provenance.new_record(
        "train", id=uuid.uuid4().hex, status="running", recipe=recipe, **contents
    )
    return Run(folder, TrainingRecord.model_validate(record | kept), written=False)


def _is_chosen_anew(change: Change, contents: dict[str, Any]) -> bool:
    """Return whether nobody made the change: how to share the work is `auto`, and chosen for
    another number of processes."""
    if change.key != "distributed.strategy":
        return False
    chosen = any(each["name"] == change.key for each in contents.get("choices", ()))
    return chosen or "auto" in (change.before, change.after)


def _clear_failed(folder: Path) -> None:
    """Remove the record of a run that failed before it saved anything."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PARENT_COPY, ignore_errors=True)


def _refuse_begun(folder: Path) -> None:
    """Raise LoraError for a folder with a run, but for one that failed before it saved anything."""
    status = TrainingRecord.read(folder / provenance.RUN_RECORD).status
    if status == "failed" and _saved_nothing(folder):
        return
    hint = f"--set output_dir=… starts another, rm -r {quote(folder)} removes it"
    if status != "finished":
        hint = f"--resume continues it, {hint}"
    raise LoraError(f"{folder} already holds a run ({status})", hint)


def _saved_nothing(folder: Path) -> bool:
    """Return whether the folder holds only what a run writes before its first checkpoint."""
    early = {*WRITTEN, ".lock", PARENT_COPY}
    return {path.name for path in folder.iterdir()} <= early


def _refuse_other_run(
    folder: Path,
    before: TrainingRecord,
    recipe: dict[str, Any],
    changes: list[Change],
    contents: dict[str, Any],
    allowed: Sequence[str],
) -> None:
    """Raise LoraError unless the run of the record `before` goes on with these changes to its
    `recipe`, and the base and the adapter to train on that `contents` name."""
    extended = changes and all(change.key in EXTENDING for change in changes)
    if before.status == "finished" and not (extended or (allowed and changes)):
        raise LoraError(
            f"the run in {folder} is finished", f"lora merge {quote(folder / 'adapter')} OUT"
        )
    _check_changes(folder, changes, allowed)
    _refuse_fewer_steps(folder, before, recipe, changes)
    parent = before.parent.sha256 if before.parent else None
    if parent != contents.get("parent", {}).get("sha256"):
        raise LoraError(
            f"the run in {folder} began with another adapter: model.adapter has changed since",
            "put that back, or --set output_dir=… starts another run",
        )
    others = _list_differences(before.base.to_data(), contents["base"], "base.")
    if before.base.fingerprint and others:
        raise LoraError(
            f"the base differs from that of the run in {folder}: {'; '.join(map(str, others[:3]))}",
            f"give the same base, or rm -r {quote(folder)} to start again",
        )


def _refuse_fewer_steps(
    folder: Path, before: TrainingRecord, recipe: dict[str, Any], changes: list[Change]
) -> None:
    """Raise LoraError where the run has more behind it than it is now to have in all: its record
    would say less than was trained."""
    lengths = [change for change in changes if change.key in LENGTHS]
    done = checkpoints.find_last_step(folder, before.id) if lengths and before.id else 0
    if not done:
        return
    most, passes = (recipe["training"][key.partition(".")[2]] for key in LENGTHS)
    epoch = saved_state.read_epoch(folder / f"checkpoint-{done}")
    for change in lengths:
        finished = change.key == "training.num_train_epochs" and before.status == "finished"
        shorter = done > most if most > 0 else epoch is not None and epoch > passes
        if shorter or (finished and change.after < change.before):
            raise LoraError(
                f"the run in {folder} has made {spell_count(done, 'step')} already: {change}",
                "give more than it has made, or --set output_dir=… starts another run",
            )


def _keep_from_before(record: TrainingRecord, changes: list[Change]) -> dict[str, Any]:
    """Return what a resumed run keeps of its `record`, with this resumption added to it.

    Warns where the run began with other versions of the libraries.
    """
    before, now = record.to_data(), provenance.new_record("train")["versions"]
    if others := _list_differences(record.versions, now):
        listed = "; ".join(map(str, others))
        ui.warn(f"the run began with other versions and may end otherwise: {listed}")
    names = ("id", "started", "data", "choices", "reduced")
    kept = {name: before[name] for name in names if name in before}
    kept["resumed"] = [*record.resumed, provenance.now()]
    _say_schedule(before["recipe"], changes)
    if changes:
        kept["changed"] = [*record.changed, *map(str, changes)]
    return kept


ENDLESS = ("constant", "reduce_lr_on_plateau")
WARMED_UP = ("constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on how many steps there are in all, but for their warm-up."""
LENGTHS = ("training.max_steps", "training.num_train_epochs")


def _say_schedule(recipe: dict[str, Any], changes: Sequence[Change]) -> None:
    """Warn where a run of another number of steps is not what it would have been from the start:
    its learning rates so far were those of the number before."""
    lengths = [change for change in changes if change.key in LENGTHS]
    training = recipe.get("training", {})
    schedule, warmup = training.get("lr_scheduler_type"), training.get("warmup_steps", 0)
    counted = warmup >= 1 or warmup == 0  # else it is a share of the steps
    if not lengths or schedule in ENDLESS or (schedule in WARMED_UP and counted):
        return
    ui.warn(
        f"{'; '.join(map(str, lengths))}: the steps so far had the learning rates of a {schedule} "
        "schedule of the number before, and from here on they are those of the new one; the run is "
        "not what it would have been from its first step"
    )


def _check_changes(folder: Path, changes: list[Change], allowed: Sequence[str]) -> None:
    """Raise LoraError unless every change is allowed, and is one that a resumed run can make."""
    if fixed := sorted(set(allowed) - set(EXTENDING)):
        message = f"--allow-changes {fixed[0]}: a resumed run cannot change it"
        raise LoraError(message, f"it may change {', '.join(EXTENDING)}")
    refused = [change for change in changes if change.key not in allowed]
    if not refused:
        return
    hint = "undo the change, or --set output_dir=… starts another run"
    if all(change.key in EXTENDING for change in refused):
        options = " ".join(f"--allow-changes {change.key}" for change in refused)
        hint = f"undo the change, or allow it: {options}"
    more = [f"and {len(refused) - 4} more"] if len(refused) > 4 else []
    listed = "; ".join([*map(str, refused[:4]), *more])
    raise LoraError(f"the recipe differs from the run in {folder}: {listed}", hint)


class Change(NamedTuple):
    """A value that differs from the one a run began with."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def _list_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Change]:
    """Each value that differs, such as `training.learning_rate 0.0002 -> 0.0001`."""
    changes: list[Change] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _list_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(Change(f"{prefix}{key}", before, after))
    return changes
