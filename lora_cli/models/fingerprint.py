"""Tell one base from another by a fingerprint of its configuration and tensors.

Of each tensor: type, shape, and a hash of some bytes at its start, middle and end. Weights that
were trained further, or scaled, or cast, differ everywhere; a single changed value between the
samples is not seen.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from lora_cli.models import settings
from lora_cli.models.tensors import NAMES, Tensors

SAMPLE = 64
# Written by transformers anew wherever a model is saved
VOLATILE = ("transformers_version", "_name_or_path", "dtype", "use_cache", "architectures")


def fingerprint_model(name: str, revision: str | None, found: Tensors | None) -> dict[str, Any]:
    """Return `config` (as its file has it) and `tensors` (name -> type, shape and hash) of a model
    on the hub or in a folder.

    `found` are its tensors; None where it has no safetensors files.
    """
    written = settings.read_settings(name, revision, "config.json")
    config = {key: value for key, value in written.items() if key not in VOLATILE}
    tensors = (
        {}
        if found is None
        else {name: _fingerprint_tensor(found, name) for name in sorted(found.entries)}
    )
    return {"config": config, "tensors": tensors}


def _fingerprint_tensor(tensors: Tensors, name: str) -> str:
    entry = tensors.entries[name]
    size = math.prod(entry.shape) * entry.dtype.itemsize
    digest = hashlib.sha256()
    with entry.file.open("rb") as file:
        for place in (0, (size - SAMPLE) // 2, size - SAMPLE):
            file.seek(entry.start + max(0, place))
            digest.update(file.read(min(SAMPLE, size)))
    shape = "x".join(map(str, entry.shape))
    return f"{NAMES[entry.dtype]} {shape} {digest.hexdigest()[:12]}"


def list_differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what differs between two fingerprints, in words; empty where they are of one model."""
    return [
        f"{kind} {name}"
        + (f" ({kept[part].get(name)}, now {now[part].get(name)})" if part == "config" else "")
        for part, kind in (("config", "the configuration's"), ("tensors", "the tensor"))
        if kept[part] and now[part]  # weights that are not in safetensors files have none
        for name in sorted(kept[part].keys() | now[part].keys())
        if kept[part].get(name) != now[part].get(name)
    ]
