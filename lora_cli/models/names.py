"""Find out what a name stands for: a GGUF, an adapter, a model's folder, a model on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from lora_cli.common import LoraError, UsageError, files, library_errors, plain_files, quote
from lora_cli.models import gguf_files, hub, reach

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Endings of files that may run code when they are loaded."""


def classify(path: str) -> str:
    """Return `gguf`, `adapter` (a folder or on the hub), `model` (a folder) or `hub` (a model
    there). Raises LoraError where the path is none of these."""
    local = Path(path)
    if not path.strip():
        raise UsageError(
            "the name of the model is empty", "give a folder, a .gguf file or a model on the hub"
        )
    if plain_files.is_gguf(path):
        if not local.is_file():
            raise LoraError(f"{path} does not exist", plain_files.suggest_other(local))
        return "gguf"
    if local.is_dir():
        if (local / "adapter_config.json").is_file():
            return "adapter"
        if (local / "config.json").is_file():
            return "model"
        inside = find_adapter_inside(local)
        hint = f"did you mean {quote(inside)}?" if inside else gguf_files.suggest_inside(local)
        raise LoraError(
            f"{path} is neither a model nor an adapter",
            hint or "give a folder with config.json or adapter_config.json",
        )
    if local.exists() or not is_hub_name(path):
        raise LoraError(
            f"{path} does not exist or is not a model",
            "give a folder, a .gguf file or a model on the hub",
        )
    return "adapter" if _is_adapter_on_hub(path) else "hub"


def find_adapter_inside(folder: Path) -> Path | None:
    """Return the adapter one level below `folder`, if there is one: a run's, one that PEFT saved
    under a name, else the newest checkpoint's."""
    found = [file.parent for file in folder.glob("[!.]*/adapter_config.json")]

    def rank(path: Path) -> tuple[bool, bool, int, str]:
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        return path.name == "adapter", step is None, int(step[1]) if step else 0, path.name

    return max(found, key=rank, default=None)


def may_be_adapter_on_hub(path: Path) -> bool:
    """Return whether this is not a path here, and may be OWNER/NAME on the hub."""
    return not path.exists() and "/" in str(path) and is_hub_name(str(path))


def find_adapter_commit(name: str) -> str:
    """Return the commit that the adapter `name` has on the hub now; offline, that in the cache.

    Raises RemoteEntryNotFoundError for a repository that does not hold an adapter, and the hub's
    other errors.
    """
    found = Path(hf_hub_download(name, "adapter_config.json")).parent.name
    return hub.check_commit(name, found)


def refuse_unreachable(name: str) -> None:
    """Raise LoraError where the hub's cache has neither a model nor an adapter of this name, and
    the hub cannot be reached."""
    wanted = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in wanted):
        return
    try:
        reach.refuse_unreachable(name)
    except LoraError as error:
        path = Path(name)
        if path.parent.is_dir() or plain_files.find_near(path):
            hint = plain_files.suggest_other(path)
        elif path.name in files.RESULTS:  # a run's folder, which is none here
            hint = f"lora runs lists what was trained below this folder; {error.hint}"
        else:
            raise
        raise LoraError(error.message, hint) from error


def _is_adapter_on_hub(name: str) -> bool:
    """Return whether the hub, or its cache, has an adapter of this name. What the hub refuses, the
    loader of a model of the name is told again.

    Raises LoraError where the hub cannot be asked and the cache has no model of the name either:
    the loader would wait for the hub as long again (half a minute).
    """
    if not may_be_adapter_on_hub(Path(name)):
        return False
    refuse_unreachable(name)
    try:
        return bool(find_adapter_commit(name))
    except LocalEntryNotFoundError:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        with explain_hub_failure(name):
            raise
    except (EntryNotFoundError, HfHubHTTPError):
        return False


@contextmanager
def explain_hub_failure(name: str) -> Iterator[None]:
    """Add to a failure which name was asked for, and that no folder has it: a mistyped folder is
    asked for on the hub, and the hub's errors need not name it.

    Raises LoraError instead of an exception that the table of library_errors knows.
    """
    try:
        yield
    except Exception as error:
        known = None if Path(name).exists() else library_errors.translate(error)
        if known is None:
            raise
        raise LoraError(
            f"{name} is not a folder here, and reading it from the hub failed: {known.message}",
            known.hint,
        ) from error


def may_be_model(name: str) -> bool:
    """Return whether `name` is a model's folder, or may be a name on the hub."""
    path = Path(name)
    if path.exists():
        return (path / "config.json").is_file()
    return is_hub_name(name)


def is_hub_name(name: str) -> bool:
    """Return whether the hub's rules allow this name: OWNER/NAME, or a canonical NAME such as
    gpt2."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
