"""LLaMA-Factory's names of data sets, looked up where they are registered:
DATASET_DIR/dataset_info.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, read_json
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rows import RowsDraft, open_rows, put_rows
from lora_cli.translate.rules import split_names
from lora_cli.translate.source import Keys

REGISTER = "dataset_info.json"
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "tools": "tools",
    "kto_tag": "label",
}

MEDIA = ("images", "videos", "audios")
"""Columns of what is no text."""


def read_datasets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which rows are trained on, and what the register knows of them."""
    names = split_names(value)
    register = _find_register(draft)
    drafts = open_rows(draft, len(names))
    unknown = []
    for name, rows in zip(names, drafts):
        entry = _find_entry(register, name)
        if entry is None:
            unknown.append(name)
            rows.values["path"] = _guess_path(draft, name)
            if draft.get("stage") == "pt" and len(names) > 1:
                rows.values["format"] = "text"
        else:
            _read_entry(rows, entry, _get_folder(draft))
        if len(names) > 1 and draft.get("max_samples"):
            rows.values["max_rows"] = draft.get("max_samples")
    put_rows(draft, drafts, keys)
    if len(names) > 1:
        draft.values.pop("data.format", None)
        draft.reasons.pop("data.format", None)
    if unknown:
        paths = ", ".join(_guess_path(draft, name) for name in unknown)
        draft.ask(
            keys,
            f"names of {REGISTER}, which is not here: {paths} is written; look at data.path",
        )
    else:
        draft.tell(keys, Kind.taken, f"{drafts[0].place.partition('[')[0]}: as {REGISTER} says")


def find_paths(draft: Draft, names: Sequence[str]) -> str | list[str]:
    """Return where the rows of registered names lie."""
    register, paths = _find_register(draft), []
    for name in names:
        rows = RowsDraft(draft, "data")
        entry = _find_entry(register, name)
        if entry is not None:
            _read_entry(rows, entry, _get_folder(draft))
        paths.append(str(rows.values.get("path") or _guess_path(draft, name)))
    return paths[0] if len(paths) == 1 else paths


def _get_folder(draft: Draft) -> str:
    return str(draft.get("dataset_dir") or "data")


def _guess_path(draft: Draft, name: str) -> str:
    """Return where LLaMA-Factory's own examples have the rows of a name."""
    return f"{_get_folder(draft)}/{name}.json"


def _find_register(draft: Draft) -> dict[str, Any] | None:
    """Return the register, from the current folder or one above the file; None where there is
    none that can be read as one."""
    above = draft.source.path.resolve().parents
    for folder in (Path(), *above):
        path = folder / _get_folder(draft) / REGISTER
        if path.is_file():
            try:
                found = read_json(path)
            except LoraError as error:
                draft.asked.append(f"{error.message}: names of data sets are not looked up in it")
                return None
            return found if isinstance(found, dict) else None
    return None


def _find_entry(register: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    entry = register.get(name) if register else None
    known = isinstance(entry, dict) and (entry.get("file_name") or entry.get("hf_hub_url"))
    return entry if known else None


def _read_entry(rows: RowsDraft, entry: dict[str, Any], folder: str) -> None:
    """Write what the register says of a data set."""
    values = rows.values
    values["path"] = entry.get("hf_hub_url") or f"{folder}/{entry['file_name']}"
    for theirs, ours in (("subset", "name"), ("split", "split"), ("num_samples", "max_rows")):
        if entry.get(theirs) is not None:
            values[ours] = entry[theirs]
    formatting = entry.get("formatting", "alpaca")
    if rows.draft.get("stage") == "kto":
        values["format"] = "unpaired"
    elif formatting in FORMATS and rows.draft.get("stage") not in ("pt", "dpo"):
        values["format"] = FORMATS[formatting]
    names = {**COLUMNS, "messages": "messages" if formatting == "openai" else "conversations"}
    if rows.draft.get("stage") == "pt":
        names = {"prompt": "text"}
    if rows.draft.get("stage") == "dpo":
        names = {each: each for each in ("prompt", "chosen", "rejected")}
        names |= {"messages": "prompt"} if formatting != "alpaca" else {}
    columns = {
        names[theirs]: name
        for theirs, name in (entry.get("columns") or {}).items()
        if theirs in names and name and names[theirs] != name
    }
    if columns:
        values["columns"] = columns
    media = {*MEDIA} & {*(entry.get("columns") or {})}
    if media:
        rows.draft.asked.append(
            f"{REGISTER} gives {values['path']} {' and '.join(sorted(media))}: lora trains on rows "
            "of texts, and refuses one with any of these"
        )
    if entry.get("tags"):
        rows.draft.asked.append(
            f"{REGISTER} gives tags for {values['path']}: lora reads from/value with human and "
            "gpt, and role/content with user and assistant"
        )
