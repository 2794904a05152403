"""Take what a model should write from rows that say which answers are better: of a pair the chosen
answer, of answers with a label those that are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.common import LoraError, spell_count, ui
from lora_cli.data import encoders, formats, preferences, unpaired
from lora_cli.recipe import Objective

OF_ALPACA = ("instruction", "input", "output", "system", "tools")


def take_better(
    rows: Sequence[tuple[Any, Any]], objective: Objective, names: Mapping[str, str]
) -> list[tuple[Any, Any]]:
    """Return rows with their places, columns under our names, as prompts with the better answers;
    without those whose answer is not wanted, and others as they are.

    `names` are those of the columns, as ours: theirs; none: as training guesses them. Raises
    LoraError where no answer is wanted.
    """
    take = _take_chosen if objective.has_pairs else _take_wanted
    found, told, wanted = [], 0, 0
    for place, row in rows:
        try:
            ours = _rename(row, objective, names) if isinstance(row, dict) else row
            compares = isinstance(ours, dict) and _is_compared(ours, objective)
            taken = take(ours) if compares else ours
        except formats.BadRow as bad:
            compares, taken = True, bad
        told, wanted = told + compares, wanted + (compares and taken is not None)
        found += [] if taken is None else [(place, taken)]
    if told and objective.has_pairs:
        ui.say("  of each pair the chosen answer")
    elif told:
        ui.say(f"  those whose answer is wanted, {wanted} of {told}")
    if not found:
        raise LoraError(f"label is false in all of {spell_count(len(rows), 'row')}", "--data FILE")
    return found


def _rename(
    row: Mapping[str, Any], objective: Objective, names: Mapping[str, str]
) -> dict[str, Any]:
    """Return a row under our names of its columns: those that were given, or that training would
    guess."""
    encoder: type[encoders.Encoder] = preferences.PreferenceEncoder
    if objective.unpaired:
        encoder = unpaired.UnpairedEncoder
    guessed = formats.guess_columns(row, encoder.row_formats, encoder.column_sets)
    return formats.rename_columns(row, names or guessed)


def _is_compared(row: Mapping[str, Any], objective: Objective) -> bool:
    """Return whether a row says which answer is better."""
    needed = formats.ANSWERS if objective.has_pairs else ("label",)
    return all(name in row for name in needed)


def _take_chosen(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt of a pair and its chosen answer, as turns."""
    return _split_turns(formats.convert_preference(row).chosen)


def _take_wanted(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a prompt and its answer, as turns, or None where the answer is not wanted. One of
    Alpaca's columns stays in these: how it is asked, a model's chat template says."""
    made = formats.convert_unpaired(row)
    if not made.desirable:
        return None
    beside = {name: value for name, value in row.items() if name != "label"}
    style, names = formats.recognise_labelled(beside)
    if style == "alpaca":
        ours = formats.rename_columns(beside, names)
        return {name: ours[name] for name in OF_ALPACA if name in ours}
    return _split_turns(made.answer)


def _split_turns(made: formats.Conversation) -> dict[str, Any]:
    """Return a conversation as what is asked and what is answered."""
    first = made.trained.index(True)
    turns = {"prompt": made.messages[:first], "completion": made.messages[first:]}
    return turns | ({"tools": made.tools} if made.tools else {})
