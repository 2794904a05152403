"""`lora import`: another tool's file becomes a recipe, and each of its keys is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_cli.common import UsageError, files, quote
from lora_cli.translate import rules
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rows import PLACEHOLDER
from lora_cli.translate.settle import settle
from lora_cli.translate.show import show_fates
from lora_cli.translate.source import Keys, read_source
from lora_cli.translate.tools import Tool, name_tool, recognise

MAPS = ("model", "training", "lora", "data", "logging", "sftconfig")
"""Sections of a file that has any: their keys are looked up by both names."""


def import_file(
    path: Path, tool: str | None, out: Path | None, model: str | None, data: str | None
) -> Path:
    """Write the recipe that a file of another tool becomes; return its path.

    `model` and `data` go before what the file names. UsageError for a file of no known tool, one
    without a model, and a recipe that exists; LoraError for another kind of training.
    """
    draft = make_draft(path, tool, model, data)
    target = out or _name_recipe(path)
    text = settle(draft, target)
    another = f"lora import {quote(path)} --out {quote(files.find_free(target))} takes another name"
    files.write_new(target, text, another)
    show_fates(draft)
    return target


def make_draft(path: Path, tool: str | None, model: str | None, data: str | None) -> Draft:
    """Return the draft of a file's recipe, in which each key of the file has its fate."""
    source = read_source(path)
    known = name_tool(tool) if tool else recognise(source)
    draft = Draft(source, known.name)
    _apply(draft, known, source.data)
    for keys in draft.list_untold():
        draft.ask(keys, f"no key of {known.name} that lora import knows: see what it does there")
    known.finish(draft)
    _name_model_and_data(draft, model, data)
    rules.say_pictures(draft)
    for key, value in known.defaults.items():
        draft.put_default(key, value)
    if _evaluates(draft):
        draft.put_default("training.keep", "last", "the last step becomes the adapter")
    return draft


def _apply(draft: Draft, tool: Tool, values: dict[str, Any], above: Keys = ()) -> None:
    """Say what becomes of each key, in the file's order; those of sections by `section.key`."""
    for key, value in values.items():
        keys = (*above, key)
        rule = tool.rules.get(".".join(map(str, keys))) or (tool.rules.get(key) if above else None)
        if isinstance(value, dict) and value and not above and key in MAPS and tool.has_sections:
            _apply(draft, tool, value, keys)
        elif value in rules.EMPTY:
            draft.tell(keys, Kind.empty, "")
        elif rules.SECRET.search(str(key)):
            rules.secret(draft, keys, value)
        elif rule is not None:
            rule(draft, keys, value)
        else:
            tool.passes_on(draft, keys, value)


OF_THE_OLD_ROWS = [
    f"data.{key}"
    for key in (
        *("path", "mix", "name", "revision", "split", "format", "columns"),
        *("eval_path", "eval_split"),
    )
]
"""What a file says of rows that it names, and not of those of `--data`."""


def _evaluates(draft: Draft) -> bool:
    return any(
        f"data.eval_{name}" in draft.values for name in ("fraction", "rows", "split", "path")
    )


def _name_model_and_data(draft: Draft, model: str | None, data: str | None) -> None:
    """Write the model and the rows that were asked for in place of the file's, and what stands for
    rows that nobody named."""
    path = draft.source.path
    if model:
        draft.replace("model.name_or_path", model, "--model")
    if "model.name_or_path" not in draft.values and "model.adapter" not in draft.values:
        raise UsageError(
            f"{path} names no model", f"lora import {quote(path)} --model NAME_OR_FOLDER"
        )
    names_rows = bool({"data.path", "data.mix"} & draft.values.keys())
    if data:
        for key in [each for each in OF_THE_OLD_ROWS if names_rows and each in draft.values]:
            draft.replace(key, None, "--data")
            del draft.values[key], draft.reasons[key]
        draft.replace("data.path", data, "--data")
    elif not names_rows:
        draft.values["data.path"] = PLACEHOLDER
        draft.reasons["data.path"] = "the file names no rows"
        draft.asked.append(f"no rows are named: data.path: {PLACEHOLDER} stands for yours")


def _name_recipe(path: Path) -> Path:
    """Return where the recipe goes: into the current folder, under the file's name, or, where that
    is the file itself, one beside it."""
    target = Path(f"{path.stem}.yaml")
    return Path(f"{path.stem}-lora.yaml") if target.resolve() == path.resolve() else target
