"""`lora runs`: the runs below a folder, a line each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import LoraError, escape, privacy, provenance, ui
from lora_cli.report import history, metrics, outcome
from lora_cli.report.seen import SeenRun, number

USUAL = Path("runs")
INSIDE = ("adapter_config.json", "config.json", provenance.ARTEFACT_RECORD)
"""A folder with one of these is a model or an adapter: no run is below it."""
LONGEST = 60
"""Characters of a cell."""


class Listed(NamedTuple):
    """A run as it is listed; `problem` says why of one that cannot be read nothing else is
    known."""

    folder: Path
    values: dict[str, Any]
    problem: str | None = None


def list_runs(folder: Path | None, as_json: bool) -> None:
    """Print the runs below a folder, by default `runs` or else the current one, the oldest first.

    LoraError where there is none.
    """
    top = folder or (USUAL if USUAL.is_dir() else Path())
    if not top.is_dir():
        raise LoraError(f"{top} is not a folder", "lora runs lists those of this folder")
    found = sorted(
        (read_listed(each, top) for each in find_runs(top)),
        key=lambda each: (str(each.values.get("started", "")), str(each.folder)),
    )
    if not found:
        raise LoraError(
            f"no run is below {top.absolute()}",
            "lora runs FOLDER looks elsewhere; lora train RECIPE starts one",
        )
    if as_json:
        ui.report_json([privacy.make_portable(each.values) for each in found])
        return
    rows = [list_cells(each) for each in found if each.problem is None]
    header = ("run", "base", "method", "steps", "evaluation", "exact", "time", "state")
    if rows:
        ui.report(*ui.format_table(header, rows))
    ui.report(
        *(f"{each.values['name']}: unreadable: {each.problem}" for each in found if each.problem)
    )


def find_runs(top: Path) -> Iterator[Path]:
    """Yield the folders of runs in a folder and below it.

    Links to folders are followed where they lead to a run, and nowhere else; models, adapters and
    hidden folders are not looked into, nor runs. A folder that cannot be read is left out, which is
    said.
    """
    waiting, seen = [top], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        if (folder / provenance.RUN_RECORD).is_file():
            status = folder.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield folder
        elif not folder.is_symlink() or folder == top:
            waiting += _list_below(folder, folder == top)


def _list_below(folder: Path, is_top: bool) -> list[Path]:
    """Return the folders in which runs may be, links to folders included; none where this is a
    model's."""
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
    except OSError as error:
        ui.warn(f"{folder} was not looked into: {error.strerror}")
        return []
    if not is_top and any(entry.name in INSIDE for entry in inside):
        return []
    found = []
    for entry in inside:
        try:
            if not entry.name.startswith(".") and entry.is_dir():
                found.append(folder / entry.name)
        except OSError:  # a link to itself
            continue
    return found


def read_listed(folder: Path, top: Path) -> Listed:
    """Return what is listed of a run, reading no more of it than that needs."""
    name = folder.resolve().name if folder == top else str(folder.relative_to(top))
    values: dict[str, Any] = {"name": name, "folder": str(folder)}
    try:
        record = SeenRun.read_run(folder / provenance.RUN_RECORD)
        evaluations = metrics.find_evaluations(folder / provenance.METRICS)
        steps = number((record.results or {}).get("steps"))
        if steps is None:
            steps = metrics.find_last_step(folder / provenance.METRICS)
        scored = history.read_evaluations(folder, record)[0]
    except LoraError as error:
        return Listed(
            folder, values | {"state": "unreadable", "problem": error.message}, error.message
        )
    state, owner = history.find_state(folder, record)
    best = outcome.find_best(record, evaluations)
    values |= {
        "id": record.id,
        "started": record.started,
        "state": state,
        "owner": owner,
        "base": record.base.name,
        "method": record.method,
        "steps": int(steps),
        "evaluation": best
        and {
            "metric": best.metric,
            "best": best.value,
            "best_step": best.step,
            "last": best.last,
            "last_step": best.last_step,
        },
        "exact": outcome.find_exact([each for _, each in scored]),
        "seconds": record.duration,
        "took": record.took,
        "short_base": record.short_base,
    }
    return Listed(folder, values)


def list_cells(listed: Listed) -> list[str]:
    """Return the cells of a run's line."""
    values = listed.values
    best = values["evaluation"]
    evaluation = ""
    if best:
        evaluation = "not finite" if best["last"] is None else f"{best['last']:.4g}"
        if best["best"] != best["last"]:
            evaluation += f" (best {best['best']:.4g} at {best['best_step']})"
        if best["metric"] != "loss":
            evaluation = f"{best['metric']} {evaluation}"
    exact = "" if values["exact"] is None else f"{values['exact']:.1%}"
    state = values["state"]
    if state == "died":
        state = "died (recorded as running, no process holds it)"
    elif values["owner"]:
        state = f"running: {values['owner']}"
    cells = [values["name"], values["short_base"], values["method"], f"{values['steps']:,}"]
    shown = [*cells, evaluation, exact, values["took"], state]
    return [_cut(escape(each)) for each in shown]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
