"""Say which file and field of a tokenizer cannot be read, and what would help.

The `tokenizers` library gives a place in the file, in characters. The field is the one without
which the file can be read.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_cli.common import LoraError, files, library_errors, missing_packages, quote_words, streams

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
READERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""What transformers reads a tokenizer.model with, and what that is installed as."""
SAMPLE = "a"
"""The text that a tokenizer is tried with."""
COPY = "its files are damaged: copy them again"


@contextmanager
def explain_faults(name: str, revision: str | None) -> Iterator[None]:
    """Raise LoraError for whatever reading the tokenizer of `name` raises, of the file, the field
    or the package that it is due to. Exceptions that are known by themselves pass through."""
    with streams.silence_libraries():
        try:
            with library_errors.translate_file_errors(
                f"the tokenizer of {name} cannot be read", COPY, but=(LoraError,)
            ):
                yield
        except Exception as error:
            explained = _explain(error, name, revision)
            if explained is None:
                raise
            raise explained from error


def _explain(error: Exception, name: str, revision: str | None) -> LoraError | None:
    """Return what is wrong with the files of `name`, or None where that is not known."""
    cause = error.__cause__ or error
    if any(missing_packages.find_missing_package(each) for each in (cause, error)):
        for module, package in READERS.items():
            if not _is_there(module):
                return LoraError(
                    f"the tokenizer of {name} cannot be read without {package}",
                    f"pip install {package}",
                )
    if not isinstance(error, LoraError):
        return None
    said = " ".join(str(cause).split())
    for file, find in (("tokenizer.json", _find_part), ("tokenizer_config.json", _find_key)):
        path = cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            continue
        try:
            data = files.parse_json(Path(path).read_bytes(), path)
        except LoraError:  # cut off, or no text: it is as damaged as it looks
            return None
        if isinstance(data, dict) and (field := find(data, said)):
            shown = Path(name, file)
            read = f"import json; print(json.load(open({str(shown)!r}))[{field!r}])"
            return LoraError(
                f"{shown}: {field} cannot be read: {said}",
                f"{quote_words(['python3', '-c', read])} shows it; pip install -U transformers, "
                "if a newer version wrote it",
            )
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _find_part(data: dict[str, Any], said: str) -> str | None:
    """Return the part of a tokenizer.json without which it can be read, else the model; None where
    all of it can be read."""
    if _is_readable(data):
        return None
    for part in (*PARTS, "added_tokens"):
        without = data | {part: [] if part == "added_tokens" else None}
        if data.get(part) is not None and _is_readable(without):
            return part
    return "added_tokens" if data.get("added_tokens", []) is None else "model"


def _is_readable(data: dict[str, Any]) -> bool:
    library = importlib.import_module("tokenizers")  # which transformers asks for
    try:
        library.Tokenizer.from_str(json.dumps(data)).encode(SAMPLE)
    except Exception:  # the library raises Exception itself
        return False
    except BaseException as error:
        if not library_errors.is_panic(error):
            raise
        return False
    return True


def _find_key(data: dict[str, Any], said: str) -> str | None:
    """Return the key of a tokenizer_config.json that an error's text names, or None."""
    return next((key for key in data if re.search(rf"\b{re.escape(key)}\b", said)), None)
