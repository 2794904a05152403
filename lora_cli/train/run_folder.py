"""The folder of a run: claim it, write its record, refuse a resumed run whose recipe has
changed."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import (
    LoraError,
    privacy,
    provenance,
    refuse_link,
    refuse_occupied,
    ui,
    write_json,
    write_text,
)
from lora_cli.recipe import strict_yaml

# Keys of a recipe that leave the steps before a checkpoint as they were: they may change when a run
# is resumed
LOGGING = (
    "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "save_steps", "save_strategy",
    "save_total_limit", "on_oom", "stop_on_loss_above",
)  # fmt: skip


EXTENDING = (
    "training.max_steps", "training.num_train_epochs", "training.eval_strategy", "training.eval_steps",
    "training.per_device_eval_batch_size", "training.dataloader_num_workers", "training.load_best_model_at_end",
    "training.max_grad_norm", "data.eval_path", "data.eval_split",
    *(f"training.{name}" for name in LOGGING),
)  # fmt: skip


def refuse_foreign_folder(folder: Path) -> None:
    """LoraError where `folder` holds something that is not a run of ours; what a kill left of one's
    start may stay."""
    refuse_link(folder)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if provenance.RUN_RECORD in names or (
            names and all(re.fullmatch(r"\.lock|\..+\.tmp", name) for name in names)
        ):
            return
    refuse_occupied(folder)


def begin_run(
    folder: Path,
    recipe: dict[str, Any],
    contents: dict[str, Any],
    resume: bool,
    allowed: Sequence[str] = (),
) -> dict[str, Any]:
    """Claim `folder`, which is locked, for a run of the resolved `recipe` and write its record with
    status `running`.

    LoraError when the folder holds another run, or, with `resume`, a run of a recipe that differs
    in more than the `allowed` keys.
    """
    refuse_link(folder)
    recipe, contents = privacy.make_portable(recipe), privacy.make_portable(contents)
    path, kept = folder / provenance.RUN_RECORD, dict[str, Any]()
    if not resume and path.is_file() and _came_to_nothing(folder):
        for name in (provenance.RUN_RECORD, provenance.RESOLVED_RECIPE, provenance.METRICS):
            (folder / name).unlink(missing_ok=True)
    if resume:
        if not path.is_file():
            raise LoraError(f"{folder} holds no run to resume", "leave --resume out")
        before = provenance.read_record(path)
        changes = _list_differences(before["recipe"], recipe)
        extended = changes and all(change.key in EXTENDING for change in changes)
        if before["status"] == "finished" and not (extended or allowed):
            raise LoraError(
                f"the run in {folder} is finished", f"lora merge {folder / 'adapter'} OUT"
            )
        _check_changes(folder, changes, allowed)
        if "fingerprint" in before["base"] and (
            others := _list_differences(before["base"], contents["base"], "base.")
        ):
            raise LoraError(
                f"the base differs from that of the run in {folder}: "
                f"{'; '.join(map(str, others[:3]))}",
                f"give the same base, or rm -r {folder} to start again",
            )
        if others := _list_differences(
            before["versions"], provenance.new_record("train")["versions"]
        ):
            ui.warn(
                "the run began with other versions and may end otherwise: "
                f"{'; '.join(map(str, others))}"
            )
        kept = {
            key: before[key]
            for key in ("id", "started", "data", "choices", "reduced")
            if key in before
        }
        kept["resumed"] = [*before.get("resumed", []), provenance.now()]
        if changes:
            kept["changed"] = [*before.get("changed", []), *map(str, changes)]
    elif path.is_file():
        status = provenance.read_record(path)["status"]
        hint = (
            f"--resume continues it, --set output_dir=… starts another, rm -r {folder} removes it"
        )
        if status == "finished":
            hint = f"--set output_dir=… starts another, rm -r {folder} removes it"
        raise LoraError(f"{folder} already holds a run ({status})", hint)
    record = (
        provenance.new_record(
            "train", id=uuid.uuid4().hex, status="running", recipe=recipe, **contents
        )
        | kept
    )
    write_json(path, record)
    write_text(folder / provenance.RESOLVED_RECIPE, strict_yaml.dump(recipe))
    return record


def _check_changes(folder: Path, changes: list[Change], allowed: Sequence[str]) -> None:
    """LoraError unless every change is allowed, and may be."""
    if fixed := sorted(set(allowed) - set(EXTENDING)):
        raise LoraError(
            f"--allow-changes {fixed[0]}: a resumed run cannot change it",
            f"it may change {', '.join(EXTENDING)}",
        )
    refused = [change for change in changes if change.key not in allowed]
    if not refused:
        return
    hint = "undo the change, or --set output_dir=… starts another run"
    if all(change.key in EXTENDING for change in refused):
        hint = "undo the change, or allow it: " + " ".join(
            f"--allow-changes {change.key}" for change in refused
        )
    more = [f"and {len(refused) - 4} more"] if len(refused) > 4 else []
    said = "; ".join([*map(str, refused[:4]), *more])
    raise LoraError(f"the recipe differs from the run in {folder}: {said}", hint)


def _came_to_nothing(folder: Path) -> bool:
    """Whether the run in `folder` failed before it saved anything: its recipe may be mended and run
    again."""
    kept = {provenance.RUN_RECORD, provenance.RESOLVED_RECIPE, provenance.METRICS, ".lock"}
    return (
        provenance.read_record(folder / provenance.RUN_RECORD)["status"] == "failed"
        and {p.name for p in folder.iterdir()} <= kept
    )


def update_record(folder: Path, record: dict[str, Any], **contents: Any) -> None:
    """Add to a run's record and write it."""
    record |= {**privacy.make_portable(contents), "updated": provenance.now()}
    write_json(folder / provenance.RUN_RECORD, record)


class Change(NamedTuple):
    """A value that differs from the one a run began with."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def _list_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Change]:
    """`training.learning_rate 0.0002 -> 0.0001` for each value that differs."""
    changes: list[Change] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _list_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(Change(f"{prefix}{key}", before, after))
    return changes
