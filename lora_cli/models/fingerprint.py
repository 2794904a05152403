"""Which base is this? A fingerprint of its configuration and tensors, quickly taken, and what differs from it.

Of each tensor: type, shape, and a hash of some bytes at its start, middle and end. Weights that were trained further,
or scaled, or cast, differ everywhere; a single changed value between the samples is not seen.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_cli.common import files
from lora_cli.common.errors import LoraError
from lora_cli.models.adapter_folder import Adapter
from lora_cli.models.tensors import NAMES, Tensors, open_model

SAMPLE = 64
# Written by transformers anew wherever a model is saved
VOLATILE = ("transformers_version", "_name_or_path", "dtype", "use_cache", "architectures")


def fingerprint_model(name: str, revision: str | None) -> dict[str, Any]:
    """`config` (as its file has it) and `tensors` (name -> type, shape and hash) of a model on the hub or in a folder.

    No tensors where it has no safetensors files.
    """
    path = cached_file(name, "config.json", revision=revision)
    settings = files.read_json(Path(str(path)))
    config = {key: value for key, value in settings.items() if key not in VOLATILE}
    found = open_model(name, revision)
    tensors = {} if found is None else {name: _fingerprint_tensor(found, name) for name in sorted(found.entries)}
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


def refuse_other_base(adapter: Adapter) -> None:
    """LoraError naming what differs where the adapter's base is not the one it was trained on.

    An adapter made elsewhere, or before fingerprints were kept, says nothing of its base.
    """
    kept = adapter.record["base"].get("fingerprint") if adapter.record else None
    if kept is None:
        return
    now = fingerprint_model(adapter.base, adapter.revision)
    different = [
        f"{kind} {name}" + (f" ({kept[part].get(name)}, now {now[part].get(name)})" if part == "config" else "")
        for part, kind in (("config", "the configuration's"), ("tensors", "the tensor"))
        if kept[part] and now[part]  # weights that are not in safetensors files have none
        for name in sorted(kept[part].keys() | now[part].keys())
        if kept[part].get(name) != now[part].get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise LoraError(
            f"{adapter.base} is not the base that {adapter.folder} was trained on: {', '.join(different[:3])}{more} "
            "differ",
            "the base has changed since: --base gives the one it was trained on",
        )
