"""The bases that are loaded, each at most once: adapters of one base are switched on it, or off for
the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.models import Adapter, Base, attach, to_accelerator
from lora_cli.speed import dora_norms


class Stored(NamedTuple):
    """What two answerers must agree in to share the weights of one loaded base."""

    base: Base
    dtype: torch.dtype
    quantization: str | None = None
    """The settings of its 4-bit storage, as text."""
    alone: Path | None = None
    """The adapter that changes the base's own weights, and so has it for itself."""


class Bases:
    """Base models loaded so far; each at most once."""

    def __init__(self) -> None:
        self.loaded: dict[Stored, PreTrainedModel | PeftModel] = {}

    @staticmethod
    def key(adapter: Adapter) -> Stored:
        """Return what the adapter's base is loaded as."""
        quantization = str(adapter.quantization) if adapter.quantization else None
        alone = None if adapter.shares_base else adapter.folder
        return Stored(adapter.base, adapter.trained_dtype, quantization, alone)

    def with_adapter(self, adapter: Adapter, name: str) -> Stored:
        """Load the adapter on its base under `name`; return the base's key."""
        key = self.key(adapter)
        base = self.loaded.get(key)
        if base is None:
            base = adapter.load_base()
            base = base if adapter.quantization else to_accelerator(base)
        base = attach.load_adapter(base, adapter.folder, name)
        dora_norms.install(base)
        self.loaded[key] = base.eval()
        return key

    def bare(self, adapter: Adapter) -> Stored:
        """Load the base of an adapter as training did, shared with adapters on it; return its
        key."""
        key = self.key(adapter)._replace(alone=None)
        if key not in self.loaded:
            base = adapter.load_base()
            self.loaded[key] = (base if adapter.quantization else to_accelerator(base)).eval()
        return key

    def plain(self, name: str) -> Stored:
        """Load a model without adapter, or take a base that is loaded already in its own type;
        return its key."""
        base = Base.of_model(name)
        wanted = Stored(base, base.dtype)
        for key in self.loaded:
            if key.base.name == name and key[1:] == wanted[1:]:
                return key
        self.loaded[wanted] = to_accelerator(base.load()).eval()
        return wanted
