"""What a name stands for, on the command line or in a file: a GGUF, an adapter, a model's folder, a
name on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from lora_cli.common import LoraError, UsageError

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Endings of files that may run code when they are loaded."""


def classify(path: str) -> str:
    """Return `gguf`, `adapter`, `model` (a folder) or `hub`. Raises LoraError where the path is
    none of these."""
    local = Path(path)
    if not path.strip():
        raise UsageError(
            "an empty name is no model", "give a folder, a .gguf file or a model on the hub"
        )
    if local.suffix == ".gguf":
        if not local.is_file():
            raise LoraError(f"{path} does not exist", f"ls {local.parent}")
        return "gguf"
    if local.is_dir():
        if (local / "adapter_config.json").is_file():
            return "adapter"
        if (local / "config.json").is_file():
            return "model"
        inside = local / "adapter"
        hint = (
            f"did you mean {inside}?"
            if inside.is_dir()
            else "give a folder with config.json or adapter_config.json"
        )
        raise LoraError(f"{path} is neither a model nor an adapter", hint)
    if local.exists() or not is_hub_name(path):
        raise LoraError(
            f"{path} does not exist or is no model",
            "give a folder, a .gguf file or a model on the hub",
        )
    return "hub"


def may_be_model(name: str) -> bool:
    """Whether `name` is a model's folder, or may be a name on the hub."""
    path = Path(name)
    if path.exists():
        return (path / "config.json").is_file()
    return is_hub_name(name)


def is_hub_name(name: str) -> bool:
    """Whether the hub's rules allow this name: OWNER/NAME, or a canonical NAME such as gpt2."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
