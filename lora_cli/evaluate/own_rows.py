"""Read the rows that a run held out of its training, which are in no file of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, UsageError, provenance, quote, ui
from lora_cli.data import encoders, formats, load, preferences, unpaired
from lora_cli.evaluate import held_out
from lora_cli.evaluate.held_out import HeldOut
from lora_cli.evaluate.scored_models import Scored
from lora_cli.models import Adapter
from lora_cli.recipe import Recipe, load_recipe

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
    columns = given or _name_columns(recipe)
    if recipe.objective_row.unpaired and not data.holds_out and data.eval_path:
        said = f"{adapter} was evaluated on {data.eval_path}, where not all answers are wanted"
        raise UsageError(f"{said}: which rows have those that are, --data says", ELSEWHERE)
    if isinstance(data.eval_path, str) and (data.eval_split or "train") == "train":
        ui.say(f"rows: {data.eval_path}, which {adapter} was evaluated on")
        return held_out.read_held_out(data.eval_path, given, columns, max_rows)
    if data.evaluates and not data.holds_out:
        where = f"{data.eval_split} of {data.eval_path or data.path}"
        raise UsageError(f"{adapter} was evaluated on {where}: which rows, --data says", ELSEWHERE)
    if not data.holds_out:
        raise UsageError(f"the run of {adapter} held no rows out of its training", ELSEWHERE)
    return _read_held(adapter, recipe, columns, max_rows)


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
    rows = held.rows[:max_rows]
    if recipe.objective_row.has_pairs:
        rows, columns = [(place, _take_chosen(row, recipe)) for place, row in rows], {}
        ui.say("  of each pair the chosen answer")
    elif recipe.objective_row.unpaired:
        rows, columns = _take_wanted(held.rows, recipe)[:max_rows], {}
        ui.say(f"  those whose answer is wanted, {len(rows)} of {len(held.rows)}")
    content = json.dumps([row for _, row in rows], sort_keys=True, default=repr)
    name = f"held out of {_name_data(recipe)}"
    ui.say(f"rows: {len(rows)} {name}, which {adapter} was not trained on")
    return held_out.list_held(name, hashlib.sha256(content.encode()).hexdigest(), rows, columns)


def _name_columns(recipe: Recipe) -> dict[str, str]:
    """Return what the columns of a run's rows are called, as ours: theirs; of pairs, the answer is
    the chosen one."""
    names = {str(ours): theirs for ours, theirs in recipe.data.columns.items()}
    if not recipe.objective_row.compares:
        return names
    chosen = names.pop("chosen", "chosen")
    return {name: theirs for name, theirs in names.items() if name != "rejected"} | {
        "completion": chosen
    }


def _take_chosen(row: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the prompt of a pair and its chosen answer, as turns."""
    ours = _rename(row, recipe, preferences.PreferenceEncoder)
    return _split_turns(formats.convert_preference(ours).chosen)


def _rename(
    row: Mapping[str, Any], recipe: Recipe, encoder: type[encoders.Encoder]
) -> dict[str, Any]:
    """Return a row under our names of its columns: those of the recipe, or that its training
    guessed."""
    guessed = formats.guess_columns(row, encoder.row_formats, encoder.column_sets)
    return formats.rename_columns(row, recipe.data.columns or guessed)


def _take_wanted(
    rows: Sequence[tuple[str, Mapping[str, Any]]], recipe: Recipe
) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows whose answer is wanted, as prompts and answers in turns. Raises LoraError
    where there is none."""
    found = []
    for place, row in rows:
        made = formats.convert_unpaired(_rename(row, recipe, unpaired.UnpairedEncoder))
        if made.desirable:
            found.append((place, _split_turns(made.answer)))
    if not found:
        raise LoraError("label is false in all rows that were held out", "--data FILE")
    return found


def _split_turns(made: formats.Conversation) -> dict[str, Any]:
    """Return a conversation as what is asked and what is answered."""
    first = made.trained.index(True)
    turns = {"prompt": made.messages[:first], "completion": made.messages[first:]}
    return turns | ({"tools": made.tools} if made.tools else {})


def _find_record(adapter: Adapter) -> Path:
    return adapter.folder.resolve().parent / provenance.RUN_RECORD


def _name_data(recipe: Recipe) -> str:
    """Return the names of the data sets, of files no more than these."""
    data = recipe.data
    paths = [rows.path for rows in data.mix] if data.mix else [data.path]
    flat = [name for path in paths for name in (path if isinstance(path, list) else [path])]
    return ", ".join(Path(str(name)).name for name in flat)
