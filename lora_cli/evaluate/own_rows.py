"""Read the rows that a run held out of its training, which are in no file of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, UsageError, provenance, quote, ui
from lora_cli.data import load
from lora_cli.evaluate import compared_rows, held_out
from lora_cli.evaluate.held_out import HeldOut
from lora_cli.evaluate.scored_models import Scored
from lora_cli.models import Adapter
from lora_cli.recipe import DEFAULT_OBJECTIVE, Recipe, load_recipe

ELSEWHERE = "--data FILE names rows; --tasks NAMES lm-eval's tasks"


def read_own_rows(
    scored: Sequence[Scored], given: Mapping[str, str], max_rows: int | None
) -> HeldOut:
    """Return the rows that the run of the first adapter evaluated on: those of `data.eval_path`, or
    those that were held out of its data.

    `given` are names of columns as the command line has them. Raises LoraError where there is no
    such run, and where what it read then reads otherwise now.
    """
    found = next(filter(None, map(_find_recipe, scored)), None)
    if found is None:
        raise UsageError("there is nothing to score models on", ELSEWHERE)
    adapter, recipe = found
    data = recipe.data
    columns = {str(ours): theirs for ours, theirs in data.columns.items()}
    if isinstance(data.eval_path, str) and (data.eval_split or "train") == "train":
        ui.say(f"rows: {data.eval_path}, which {adapter} was evaluated on")
        objective = recipe.objective_row
        return held_out.read_held_out(data.eval_path, given, columns, max_rows, objective)
    if data.evaluates and not data.holds_out:
        where = f"{data.eval_split} of {data.eval_path or data.path}"
        raise UsageError(f"{adapter} was evaluated on {where}: which rows, --data says", ELSEWHERE)
    if not data.holds_out:
        raise UsageError(f"the run of {adapter} held no rows out of its training", ELSEWHERE)
    return _read_held(adapter, recipe, given or columns, max_rows)


def _find_recipe(scored: Scored) -> tuple[Adapter, Recipe] | None:
    """Return an adapter that lies in the folder of its run, with the recipe of the run."""
    if scored.kind != "adapter" or scored.adapter is None or scored.adapter.record is None:
        return None
    file = scored.adapter.folder.resolve().parent / provenance.RESOLVED_RECIPE
    return (scored.adapter, load_recipe(file)) if file.is_file() else None


def _read_held(
    adapter: Adapter, recipe: Recipe, columns: Mapping[str, str], max_rows: int | None
) -> HeldOut:
    assert adapter.record is not None
    try:
        held = load.read_held_rows(recipe, adapter.load_tokenizer(), adapter.record.day)
    except LoraError as error:
        raise LoraError(
            f"the rows that {adapter} was evaluated on cannot be read: {error.message}",
            f"--data FILE, in their place; {error.hint}" if error.hint else "--data FILE",
        ) from None
    before = adapter.record.holdout
    if before is None or before.fingerprint != held.fingerprint:
        raise LoraError(
            f"the data that {adapter} was trained on has changed since: the rows held out of it "
            "now may be some that it was trained on",
            f"--data FILE; {quote(_find_record(adapter))} says which data that was",
        )
    rows: Sequence[tuple[str, Any]] = held.rows
    if recipe.objective_row.compares:
        rows, columns = compared_rows.take_better(rows, recipe.objective_row, columns), {}
    rows = rows[:max_rows]
    content = json.dumps([row for _, row in rows], sort_keys=True, default=repr)
    name = f"held out of {_name_data(recipe)}"
    ui.say(f"rows: {len(rows)} {name}, which {adapter} was not trained on")
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return held_out.list_held(name, sha256, rows, columns, DEFAULT_OBJECTIVE)


def _find_record(adapter: Adapter) -> Path:
    return adapter.folder.resolve().parent / provenance.RUN_RECORD


def _name_data(recipe: Recipe) -> str:
    """Return the names of the data sets, of files no more than these."""
    data = recipe.data
    paths = [rows.path for rows in data.mix] if data.mix else [data.path]
    flat = [name for path in paths for name in (path if isinstance(path, list) else [path])]
    return ", ".join(Path(str(name)).name for name in flat)
