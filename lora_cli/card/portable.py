"""A record as it may be shown to anybody: names of files in place of paths, no secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_cli.common import privacy
from lora_cli.models import names

ABSOLUTE = re.compile(r"(?:~?[/\\]|[A-Za-z]:[/\\])[^/\\\n]+[/\\][^\n]*|~[/\\]?[^\n]*|file:[^\n]*")
"""A path from the root or the home folder: of two names, since `/no_think` is a prompt."""
AMID = re.compile(r"(?<![\w./~:@-])/[\w.+@-]+(?:/[\w.+@-]+)+")
"""What may be such a path amid prose."""
PLACES = ("path", "eval_path", "name_or_path", "adapter", "output_dir", "name")
"""Keys of records that hold a folder, a file or a name on the hub."""
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".zip", ".gz")
NO_OWNER = (".", "..", "~")


def trim_paths(data: Any, renamed: Mapping[str, str] | None = None) -> Any:
    """Return JSON values of a record as they may leave this machine.

    Paths become the name of their file or folder, secrets `***`, and what `renamed` names (a local
    base) gets the name that it has there. Names on the hub stay.
    """
    return _Trimmer(dict(renamed or {})).trim(privacy.mask_each(data), "")


class _Trimmer:
    """Walks a record, in which a key says what its text is."""

    def __init__(self, renamed: dict[str, str]) -> None:
        self.renamed = renamed

    def trim(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {self._trim_text(k, ""): self.trim(inner, k) for k, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.trim(inner, key) for inner in value]
        return self._trim_text(value, key) if isinstance(value, str) else value

    def _trim_text(self, text: str, key: str) -> str:
        if text in self.renamed:
            return self.renamed[text]
        if key in PLACES:
            return text if is_public_name(text) else name_file(text)
        if ABSOLUTE.fullmatch(text) or _is_here(text):
            return name_file(text)
        return leave_out_places(text)


def is_public_name(text: str) -> bool:
    """Return whether a text is a name on the hub, `OWNER/NAME` or `NAME`, and no file or folder of
    this machine."""
    owner, _, rest = text.partition("/")
    return (
        names.is_hub_name(text)
        and not (owner in NO_OWNER or rest.lower().endswith(TABLES))
        and not _is_here(text)
    )


def _is_here(text: str) -> bool:
    """Return whether this is a path with folders in it, to something that is here."""
    if "\n" in text or len(text) > 1000 or not ("/" in text or os.sep in text):
        return False
    return os.path.lexists(privacy.expand_home(text))


def name_file(path: str) -> str:
    """Return the last part of a path or an address, without what may follow it there."""
    if re.match("[A-Za-z]:\\\\", path):
        return PureWindowsPath(path).name
    if "://" in path:
        path = re.split("[?#]", path)[0]
    return PurePosixPath(path.rstrip("/")).name or "."


def leave_out_places(text: str) -> str:
    """Return prose with ~ for the home folder, . for the current one, and the names of other files
    and folders that are here."""
    here = str(Path.cwd())
    if here != "/":
        text = re.sub(rf"(?:(?<![\w./~-])|(?<=://)){re.escape(here)}(?![\w-])", ".", text)
    text = privacy.replace_home(text)
    return AMID.sub(lambda found: name_file(found[0]) if _is_here(found[0]) else found[0], text)
