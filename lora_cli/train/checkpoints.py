"""Checkpoints that are there whole or not at all, and know what run and step they belong to.

A checkpoint is written in a folder of its own, each file is flushed to the disk, `manifest.json`
with the size and sha256 of every other file comes last, and one rename gives the folder its name,
`checkpoint-N`. A folder of that name without a manifest that holds is not a checkpoint: nothing is
resumed from it, and nothing of it is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import files, ui

MANIFEST, STAGING = "manifest.json", ".saving.tmp"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", STATE, "run_state.json")
"""Without one of these a continued run would be another one."""
BLOCK = 1 << 20


class Checkpoint(NamedTuple):
    """A checkpoint whose files are what its manifest says; `resumable` unless it was saved without
    optimiser state."""

    folder: Path
    step: int
    resumable: bool
    size: int
    """Bytes of all its files but the manifest."""


class Unusable(NamedTuple):
    """A folder named like a checkpoint, and why it is none."""

    folder: Path
    step: int
    reason: str
    ours: bool
    """Whether its manifest can be read and names this run."""


@contextmanager
def stage_checkpoint(folder: Path, run: str, step: int) -> Iterator[Path]:
    """An empty folder to write the run's checkpoint of this step into; it is sealed and named when
    the block ends.

    What already has the name, and cannot be a checkpoint of this run, is set aside. After a failure
    nothing is left.
    """
    final, parent = folder / f"checkpoint-{step}", folder / STAGING
    staging = parent / final.name
    with files.passing(parent):
        staging.mkdir(parents=True)
        yield staging
        _seal_folder(staging, run, step)
        if final.exists() or final.is_symlink():
            _set_aside(final, run)
        staging.rename(final)
        _flush(folder)


def _seal_folder(folder: Path, run: str, step: int) -> None:
    """Flush every file, then write the manifest."""
    described = {}
    for name in _list_names(folder):
        path = folder / name
        size, digest = _hash_file(path)
        described[name] = {"size": size, "sha256": digest}
        _flush(path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush(path)
    files.write_text(folder / MANIFEST, _make_manifest(run, step, described))
    _flush(folder)


def _make_manifest(run: str, step: int, described: dict[str, Any]) -> str:
    return (
        json.dumps(
            {"format": FORMAT, "run": run, "step": step, "files": described},
            indent=1,
            sort_keys=True,
        )
        + "\n"
    )


def read_checkpoint(folder: Path, run: str) -> Checkpoint | Unusable:
    """What the folder `checkpoint-N` is for this run: every file is read and compared."""
    step = _parse_step(folder)
    assert step is not None, folder
    if folder.is_symlink():
        return Unusable(folder, step, "it is a link, which is not followed", False)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        owner, said, described = manifest["run"], manifest["step"], manifest["files"]
        size = sum(each["size"] for each in described.values() if len(each) == 2 and each["sha256"])
        if _make_manifest(owner, said, described) != text:  # as we write it, to the byte
            raise ValueError
    except FileNotFoundError:
        return Unusable(
            folder, step, "it has no manifest: saving it was interrupted, or it is not ours", False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Unusable(folder, step, f"its {MANIFEST} is damaged", False)
    if owner != run:
        return Unusable(folder, step, "it belongs to another run", False)
    if said != step:
        return Unusable(
            folder, step, f"it is the checkpoint of step {said} under another name", False
        )
    reason = _find_difference(folder, described)
    if reason:
        return Unusable(folder, step, reason, True)
    resumable = all(name in described for name in NEEDED) and any(
        name.startswith("rng_state") for name in described
    )
    return Checkpoint(folder, step, resumable, size)


def _find_difference(folder: Path, described: dict[str, Any]) -> str | None:
    """In what the folder's files are not those described; None if they are."""
    present = {name for name in _list_names(folder) if not Path(name).name.startswith(".")} - {
        MANIFEST
    }
    if missing := sorted(described.keys() - present):
        return f"{missing[0]} is missing"
    if added := sorted(present - described.keys()):
        return f"{added[0]} was added to it"
    for name, told in sorted(described.items()):
        path = folder / name
        if path.is_symlink():
            return f"{name} is a link"
        if (size := path.stat().st_size) != told["size"]:
            return f"{name} has {size} of {told['size']} bytes"
        if _hash_file(path)[1] != told["sha256"]:
            return f"{name} is damaged"
    return None


def walk_checkpoints(folder: Path, run: str) -> Iterator[Checkpoint | Unusable]:
    """The checkpoints in a run's folder, the newest first, each read when it is asked for."""
    found = {step: path for path in folder.iterdir() if (step := _parse_step(path)) is not None}
    for step in sorted(found, reverse=True):
        yield read_checkpoint(found[step], run)


def find_newest(folder: Path, run: str) -> Checkpoint | None:
    """The newest checkpoint to resume from, saying which were skipped and why; None where there is
    none."""
    for each in walk_checkpoints(folder, run):
        reason = each.reason if isinstance(each, Unusable) else _explain_incomplete(each, run)
        if reason is None and isinstance(each, Checkpoint):
            return each
        ui.say(f"  {each.folder.name} skipped: {reason}")
    return None


def _explain_incomplete(checkpoint: Checkpoint, run: str) -> str | None:
    """Why a whole checkpoint cannot be resumed from; None if it can."""
    if not checkpoint.resumable:
        return "it was saved without the optimiser's state"
    best = files.read_json(checkpoint.folder / STATE).get("best_global_step")
    if best and best != checkpoint.step:
        kept = checkpoint.folder.with_name(f"checkpoint-{best}")
        if not kept.is_dir():
            return f"the best model so far, {kept.name}, is missing"
        found = read_checkpoint(kept, run)
        if isinstance(found, Unusable):
            return f"of the best model so far, {kept.name}, {found.reason}"
    return None


def delete_old(folder: Path, run: str, keep: int | None, newest: int, best: int | None) -> None:
    """Delete this run's checkpoints beyond `keep`: those of steps after `newest`, which a damaged
    one left behind, then the oldest; never those of the steps `newest` and `best`.

    Only folders with our manifest and this run's id are counted or deleted.
    """
    ours = [
        (step <= newest, step)
        for path in folder.iterdir()
        if (step := _parse_step(path)) is not None and _is_owned(path, run)
    ]
    if keep is None:
        return
    removable = [step for _, step in sorted(ours) if step not in (newest, best)]
    for step in removable[: max(0, len(ours) - keep)]:
        doomed = (
            folder / STAGING / f"checkpoint-{step}"
        )  # so that a kill leaves no half of it under its name
        with files.passing(doomed.parent):
            doomed.parent.mkdir()
            (folder / doomed.name).rename(doomed)


def _is_owned(folder: Path, run: str) -> bool:
    """Whether the folder has a manifest of this run for the step in its name."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            not folder.is_symlink()
            and manifest["run"] == run
            and manifest["step"] == _parse_step(folder)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _set_aside(final: Path, run: str) -> None:
    """Make room for a checkpoint: what is damaged and ours goes, anything else gets another
    name."""
    if _is_owned(final, run):
        _remove(final)
        return
    aside = next(
        path
        for number in range(1, 1_000_000)
        if not (path := final.with_name(f"{final.name}.aside{number}")).exists()
    )
    final.rename(aside)
    ui.warn(f"{final} was no checkpoint of this run, and is now {aside.name}")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process of ours left half-made in a run's folder; nobody else may be at
    work there."""
    for path in folder.iterdir():
        if path.name == STAGING or re.fullmatch(r"\.[\w.-]+\.\d+\.tmp", path.name):
            _remove(path)


def _parse_step(path: Path) -> int | None:
    """N of `checkpoint-N`; None for other names and for files."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def _list_names(folder: Path) -> list[str]:
    """The files below the folder, as paths within it."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    )


def _hash_file(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
