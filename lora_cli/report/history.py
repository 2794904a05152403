"""Read what a run was: its folder, and the merged models and GGUF files that were made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_cli.common import (
    LoraError,
    UsageError,
    lock,
    plain_files,
    privacy,
    provenance,
    quote,
    stored,
)
from lora_cli.report import answers, metrics
from lora_cli.report.seen import SeenMade, SeenRun

EVALUATION = "evaluation.json"
MOST_BESIDE = 2000
"""Folders beside a run's that are looked into for what was made of it."""


class Evaluation(stored.Stored):
    """What `lora evaluate` has found: each model's metrics on the same rows."""

    started: str = ""
    data: dict[str, Any] = {}
    models: list[dict[str, Any]] = []
    differing: int | None = None

    def find_kind(self, kind: str) -> dict[str, Any] | None:
        """Return the first model of a kind: base, adapter, merged or gguf.

        A checkpoint, or what the adapter was before the run went on, is not the run's adapter.
        """
        found = [model for model in self.models if model.get("kind") == kind]
        if kind == "adapter":
            found = [each for each in found if not _is_earlier(each.get("path"))]
        return next(iter(found), None)


def _is_earlier(path: Any) -> bool:
    """Return whether a model's folder is named like a checkpoint, or an adapter of fewer steps."""
    return bool(re.fullmatch(r"(checkpoint|adapter)-\d+", Path(str(path)).name))


class Made(NamedTuple):
    """A merged model's folder, or a GGUF file, and its record."""

    kind: Literal["merged", "gguf"]
    path: Path
    record: SeenMade


@dataclass
class History:
    """A run, read. `problems`: what of it could not be read, in words."""

    folder: Path
    record: SeenRun
    state: str
    """finished, failed, interrupted, running, died (recorded as running, and nobody holds the
    folder), or what the record says."""
    owner: str | None = None
    """Who holds the folder of a run that is running."""
    metrics: metrics.Metrics = field(default_factory=metrics.Metrics)
    samples: answers.Samples = field(default_factory=answers.Samples)
    evaluations: list[tuple[Path, Evaluation]] = field(default_factory=list)
    """The oldest first."""
    made: list[Made] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def name_runs(runs: Sequence[History]) -> list[str]:
    """Return what runs are called beside each other: the names of their folders, and for those of
    one name as many of the folders around them as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]

    def name(path: tuple[str, ...]) -> str:
        ends = (path[-length:] for length in range(1, len(path)))
        found = (end for end in ends if [each[-len(end) :] for each in paths].count(end) == 1)
        return str(Path(*next(found, path)))

    return list(map(name, paths))


def find_state(folder: Path, record: SeenRun) -> tuple[str, str | None]:
    """Return a run's state, and who holds its folder where it is running."""
    if record.status != "running":
        return record.status, None
    try:
        owner = lock.find_owner(folder)
    except LoraError:
        return "running", "a process that this user may not see"
    return ("running", owner) if owner else ("died", None)


def read_runs(paths: Sequence[Path]) -> list[History]:
    """Return the runs that paths name: each a run's folder or its adapter, and the merged models
    and GGUF files among the paths with the run that they are of.

    UsageError for a path that is neither, and for what was made of none of these runs.
    """
    folders: dict[Path, Path] = {}
    given: list[Made] = []
    for path in paths:
        if made := read_made(path):
            given.append(made)
        else:
            folder = find_folder(path)
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise UsageError(
            "no run is among these", "give the run's folder, too; lora runs lists them"
        )
    runs = [read_run(folder) for folder in folders.values()]
    for made in given:
        owners = [run for run in runs if run.record.id and run.record.id == made.record.run_id]
        if not owners:
            raise UsageError(
                f"{made.path} was made of none of these runs", "give the run that it was made of"
            )
        for run in owners:
            if run.record.is_before_it_went_on(made.record.started):
                run.problems = list(dict.fromkeys([*run.problems, _explain_earlier(made.path)]))
            elif made.path.resolve() not in {each.path.resolve() for each in run.made}:
                run.made.append(made)
    return runs


def find_folder(path: Path) -> Path:
    """Return the run's folder that a path names, which may be its adapter's; UsageError for any
    other path."""
    for folder in (path, path.resolve().parent):
        if (folder / provenance.RUN_RECORD).is_file():
            # as it was given, as far as it can be
            return folder if folder == path or path.is_absolute() else _shorten(folder)
    if not path.exists():
        raise UsageError(f"{path} does not exist", "lora runs lists the runs below a folder")
    what = "a GGUF file without a record" if plain_files.is_gguf(path) else "no run"
    raise UsageError(
        f"{path} is {what}: there is no {provenance.RUN_RECORD} in it",
        "lora runs lists the runs below a folder",
    )


def _shorten(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def read_run(folder: Path) -> History:
    """Return what a run's folder holds, and what was made of it there and beside it.

    LoraError where the record cannot be read; what else cannot is among the `problems`.
    """
    record = SeenRun.read_run(folder / provenance.RUN_RECORD)
    state, owner = find_state(folder, record)
    run = History(folder, record, state, owner)
    try:
        run.metrics = metrics.read_metrics(folder / provenance.METRICS)
    except LoraError as error:
        run.problems.append(error.message)
    try:
        run.samples = answers.read_samples(folder / provenance.SAMPLES)
    except LoraError as error:
        run.problems.append(error.message)
    run.evaluations, problems = read_evaluations(folder, record)
    run.problems += problems
    run.made = _find_made(run)
    return run


def read_evaluations(
    folder: Path, record: SeenRun
) -> tuple[list[tuple[Path, Evaluation]], list[str]]:
    """Return the evaluations in a run's folder, the oldest first, and what is wrong with the
    others: they cannot be read, or are of the adapter from before the run went on."""
    found, problems = [], []
    for file in sorted((folder / provenance.EVALUATIONS).glob(f"*/{EVALUATION}")):
        try:
            evaluation = Evaluation.read(file)
        except LoraError as error:
            problems.append(error.message)
            continue
        if record.is_before_it_went_on(evaluation.started):
            problems.append(_explain_earlier(file.parent))
        else:
            found.append((file.parent, evaluation))
    return sorted(found, key=lambda each: each[1].started), problems


def _explain_earlier(path: Path) -> str:
    return f"{path} is of the adapter from before the run went on"


def read_made(path: Path) -> Made | None:
    """Return the merged model or the GGUF file that a path names, None for anything else.

    LoraError where its record cannot be read.
    """
    record = _find_record(path)
    if not record.is_file() or (path / "adapter_config.json").is_file():
        return None
    kind: Literal["merged", "gguf"] = "merged" if record.parent == path else "gguf"
    return Made(kind, path, SeenMade.read(record))


def _find_made(run: History) -> list[Made]:
    """Return what was made of a run's adapter and lies in its folder or beside it."""
    if run.record.id is None:
        return []
    found: dict[Path, Made] = {}
    for path in _list_candidates(run.folder):
        is_inside = path.is_relative_to(run.folder)
        try:
            made = read_made(path) if is_inside or _mentions(path, run.record.id) else None
        except LoraError as error:
            run.problems += [error.message] if is_inside else []
            continue
        if not made or made.record.run_id != run.record.id or path.resolve() in found:
            continue
        if run.record.is_before_it_went_on(made.record.started):
            run.problems.append(_explain_earlier(path))
        else:
            found[path.resolve()] = made
    return sorted(found.values(), key=lambda made: (made.kind != "merged", made.record.started))


def _find_record(path: Path) -> Path:
    """Return where the record of a merged model, or of a GGUF file, is."""
    is_file = path.is_file() and plain_files.is_gguf(path)
    return path.with_name(f"{path.name}.json") if is_file else path / provenance.ARTEFACT_RECORD


def _mentions(path: Path, run_id: str) -> bool:
    """Return whether the record of a path speaks of a run at all: with a thousand models beside a
    run, none of the others' is taken apart."""
    record = _find_record(path)
    return record.is_file() and run_id in plain_files.read_small(record)


def _list_candidates(folder: Path) -> list[Path]:
    """Return what may be a merged model or a GGUF file in a run's folder, and in the merged models
    and plain folders of this one and beside it."""
    folder = Path(folder)
    folders = [folder, *_list_folders(folder)]
    if folder.resolve().parent != folder.resolve():
        beside = folder.parent if folder.name else folder.resolve().parent
        others = [each for each in _list_folders(beside) if not _is_run(each)]
        folders += [beside, *others[:MOST_BESIDE]]
    found = []
    for each in folders:
        found.append(each)
        try:
            found += sorted(filter(plain_files.has_gguf_name, each.iterdir()))
        except OSError:  # not ours to read
            continue
    return found


def _list_folders(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError:  # not ours to read
        return []
    return [each for each in inside if not each.name.startswith(".") and each.is_dir()]


def _is_run(folder: Path) -> bool:
    return (folder / provenance.RUN_RECORD).is_file()


def stamp(folder: Path) -> int:
    """Return what changes whenever a run's record is written, 0 where there is none."""
    try:
        status = (folder / provenance.RUN_RECORD).stat()
    except OSError:
        return 0
    return hash((status.st_ino, status.st_mtime_ns))


def describe_path(path: Path) -> str:
    """Return a path as it may be shown to others: ~ for the home folder, no secrets."""
    return str(privacy.make_portable(str(path)))


def write_command(*words: str) -> str:
    """Return a command to repeat something by, each word quoted; a path in the home folder stays
    one for whoever pastes it."""
    shown = []
    for word in words:
        portable = describe_path(Path(word)) if word.startswith("/") else word
        home, rest = ("~/", portable[2:]) if portable.startswith("~/") else ("", portable)
        is_option = re.fullmatch("--[a-z]+", rest)
        shown.append(rest if is_option else f"{home}{quote(rest)}")
    return " ".join(shown)
