"""Write and read checkpoints that are there whole or not at all.

A checkpoint is written in a folder of its own, and each file is flushed to the disk.
`manifest.json` comes last: it names the run and the step, with the size and sha256 of every other
file. One rename then gives the folder its name, `checkpoint-N`. A folder of that name whose
manifest is missing or does not match is not a checkpoint: no run resumes from it, and none deletes
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import ConfigDict

from lora_cli.common import LoraError, files, plain_files, stored, ui
from lora_cli.distributed import ranks
from lora_cli.train import saved_state

MANIFEST = "manifest.json"
FORMAT: Final = 1
NAME = re.compile(r"checkpoint-(\d+)")
NEEDED = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    saved_state.TRAINER_STATE,
    saved_state.RUN_STATE,
)
"""A run that goes on without one of these is another run."""
BLOCK = 1 << 20
"""Bytes read at a time to hash a file."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files match its manifest."""

    folder: Path
    step: int
    resumable: bool
    """False for one that was saved without the optimiser's state."""
    size: int
    """Bytes of all its files but the manifest."""


class Unusable(NamedTuple):
    """A folder named like a checkpoint, and why it cannot be used as one."""

    folder: Path
    step: int
    reason: str


@contextmanager
def stage_checkpoint(folder: Path, run_id: str, step: int) -> Iterator[Path]:
    """Yield an empty folder for the run's checkpoint of this step, and seal and name it at the end.

    Whatever else has that name already is moved aside. After a failure nothing is left.
    """
    final = folder / f"checkpoint-{step}"
    with files.scratch_folder(folder) as scratch:
        staging = scratch / final.name
        staging.mkdir()
        yield staging
        _seal_folder(staging, run_id, step)
        if final.exists() or final.is_symlink():
            _set_aside(final, run_id)
        staging.rename(final)
        _flush(folder)


def _seal_folder(folder: Path, run_id: str, step: int) -> None:
    """Flush every file, then write the manifest."""
    described = dict[str, Described]()
    for name in _list_names(folder):
        path = folder / name
        size, digest = _hash_file(path)
        described[name] = Described(size=size, sha256=digest)
        _flush(path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush(path)
    manifest = Manifest(run=run_id, step=step, files=described)
    files.write_text(folder / MANIFEST, manifest.to_text())
    _flush(folder)


class Described(stored.Stored):
    """A file of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    size: stored.Count
    sha256: stored.Sha256


class Manifest(stored.Stored):
    """What a checkpoint holds."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = FORMAT
    run: str
    step: stored.Count
    files: dict[str, Described]

    def to_text(self) -> str:
        """Return what the file holds, to the byte."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"


def read_checkpoint(folder: Path, run_id: str) -> Checkpoint | Unusable:
    """Return what the folder `checkpoint-N` is for this run; every file is read and compared."""
    step = _parse_step(folder)
    assert step is not None, folder
    if folder.is_symlink():
        return Unusable(folder, step, "it is a link, which is not followed")
    if not os.path.lexists(folder / MANIFEST):
        reason = "it has no manifest: saving it was interrupted, or it is not ours"
        return Unusable(folder, step, reason)
    try:
        manifest = Manifest.read(folder / MANIFEST)
        if plain_files.read_small(folder / MANIFEST) != manifest.to_text():
            raise stored.explain_damage(folder / MANIFEST, "it is not as it was written")
    except LoraError as error:
        return Unusable(folder, step, error.message)
    if manifest.run != run_id:
        return Unusable(folder, step, "it belongs to another run")
    if manifest.step != step:
        reason = f"it is the checkpoint of step {manifest.step} under another name"
        return Unusable(folder, step, reason)
    if difference := _find_difference(folder, manifest.files):
        return Unusable(folder, step, difference)
    size = sum(each.size for each in manifest.files.values())
    return Checkpoint(folder, step, _is_resumable(manifest.files), size)


@contextmanager
def fetched(folder: Path | None, run_id: str) -> Iterator[Path | None]:
    """Give the first rank's checkpoint on all ranks, also those whose machine does not share its
    disk; None where it has none."""
    if ranks.count() == 1:
        yield folder
        return
    mark = None
    if folder and folder.is_dir() and isinstance(read_checkpoint(folder, run_id), Checkpoint):
        mark = (folder / MANIFEST).read_bytes()
    with ranks.fetched(folder, mark) as here:
        yield here


def _find_difference(folder: Path, described: dict[str, Described]) -> str | None:
    """Return how the folder's files differ from those described; None if they are the same."""
    present = {name for name in _list_names(folder) if not Path(name).name.startswith(".")} - {
        MANIFEST
    }
    if missing := sorted(described.keys() - present):
        return f"{missing[0]} is missing"
    if added := sorted(present - described.keys()):
        return f"{added[0]} was added to it"
    for name, expected in sorted(described.items()):
        path = folder / name
        if path.is_symlink():
            return f"{name} is a link"
        if (size := path.stat().st_size) != expected.size:
            return f"{name} has {size} of {expected.size} bytes"
        if _hash_file(path)[1] != expected.sha256:
            return f"{name} is damaged"
    return None


def walk_checkpoints(folder: Path, run_id: str) -> Iterator[Checkpoint | Unusable]:
    """Yield the checkpoints in a run's folder, the newest first, each read when it is reached."""
    found = {step: path for path in folder.iterdir() if (step := _parse_step(path)) is not None}
    for step in sorted(found, reverse=True):
        yield read_checkpoint(found[step], run_id)


def find_newest(folder: Path, run_id: str, keeps_best: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint to resume from, or None; says on the screen which it skips and
    why. A run that `keeps_best` needs that of its best step as well."""
    for each in walk_checkpoints(folder, run_id):
        reason = each.reason if isinstance(each, Unusable) else None
        if isinstance(each, Checkpoint):
            reason = _explain_incomplete(each, run_id, keeps_best)
        if reason is None and isinstance(each, Checkpoint):
            return each
        ui.say(f"  {each.folder.name} skipped: {reason}")
    return None


def _explain_incomplete(checkpoint: Checkpoint, run_id: str, keeps_best: bool) -> str | None:
    """Why a run cannot resume from a checkpoint that is whole; None if it can."""
    if not checkpoint.resumable:
        return "it was saved without the optimiser's state"
    try:
        best = saved_state.read_states(checkpoint.folder, checkpoint.step).best_global_step
    except LoraError as error:
        return error.message
    if not keeps_best or not best or best == checkpoint.step:
        return None
    kept = checkpoint.folder.with_name(f"checkpoint-{best}")
    without = "--set training.keep=last does without"
    if not kept.is_dir():
        return f"the best model so far, {kept.name}, is missing ({without})"
    found = read_checkpoint(kept, run_id)
    if isinstance(found, Unusable):
        return f"of the best model so far, {kept.name}, {found.reason} ({without})"
    return None


def find_last_step(folder: Path, run_id: str) -> int:
    """Return the step of the newest checkpoint to resume from, by the manifests alone; 0 without
    one.

    Resuming reads and compares every file; a message after Ctrl-C does not have to wait for that.
    """
    manifests = [_read_own_manifest(path, run_id) for path in folder.iterdir()]
    return max((each.step for each in manifests if each and _is_resumable(each.files)), default=0)


def delete_old(folder: Path, run_id: str, keep: int | None, last: int, best: int | None) -> None:
    """Delete this run's checkpoints beyond `keep`, never those of the steps `last` and `best`.

    Those of steps after `last`, which a run leaves behind when it resumes before a damaged one, go
    first, then the oldest. Only folders with our manifest and this run's id are counted or deleted.
    """
    if keep is None:
        return
    manifests = [_read_own_manifest(path, run_id) for path in folder.iterdir()]
    steps = [manifest.step for manifest in manifests if manifest]
    removable = sorted(
        (step for step in steps if step not in (last, best)), key=lambda step: (step <= last, step)
    )
    for step in removable[: max(0, len(steps) - keep)]:
        # moved first, so that a kill never leaves half a checkpoint under its name
        with files.scratch_folder(folder) as scratch:
            (folder / f"checkpoint-{step}").rename(scratch / "doomed")


def _read_own_manifest(folder: Path, run_id: str) -> Manifest | None:
    """Return the manifest in `folder`, if it is one of this run for the step in the folder's
    name."""
    step = _parse_step(folder)
    if step is None or folder.is_symlink():
        return None
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except LoraError:
        return None
    return manifest if (manifest.run, manifest.step) == (run_id, step) else None


def _is_resumable(described: Collection[str]) -> bool:
    """Return whether these files of a checkpoint suffice for the same run to go on."""
    generators = any(name.startswith("rng_state") for name in described)
    return generators and all(name in described for name in NEEDED)


def _set_aside(final: Path, run_id: str) -> None:
    """Make room for a checkpoint: remove a damaged one of this run, and rename anything else."""
    if _read_own_manifest(final, run_id):
        files.remove(final)
        return
    aside = next(
        path
        for number in range(1, 1_000_000)
        if not (path := final.with_name(f"{final.name}.aside{number}")).exists()
    )
    final.rename(aside)
    ui.warn(f"{final} was not a checkpoint of this run, and is now {aside.name}")


def _parse_step(path: Path) -> int | None:
    """N of `checkpoint-N`; None for other names and for files."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def _list_names(folder: Path) -> list[str]:
    """Return the files and links below the folder, as paths within it."""
    found = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    return sorted(str(path.relative_to(folder)) for path in found)


def _hash_file(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    # Windows flushes only what is open for writing, and a folder cannot be opened at all
    if os.name == "nt":
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
