"""Look at the settings of a model before a library reads them: they may be anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_cli.common import LoraError, quote, read_json

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_settings(name: str, revision: str | None, file: str) -> dict[str, Any]:
    """Return what a JSON file of a model on the hub or in a folder holds; nothing where it has no
    such file.

    Raise LoraError where the file is no mapping, or beyond the limits of `read_json`; the hub's
    errors where it cannot be asked.
    """
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    found = {} if path is None else read_json(Path(path))
    if not isinstance(found, dict):
        raise LoraError(f"{path} is not a mapping", f"copy it again; less {quote(path)} shows it")
    return found
