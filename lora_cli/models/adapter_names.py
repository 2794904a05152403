"""Read adapters whose tensors another program has named: without PEFT's prefix, with the adapter's
name in them, or as torch.compile and DistributedDataParallel call modules.

PEFT itself would leave such tensors out, or ask for another base.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from lora_cli.common import files, show_as, ui

PREFIX = "base_model.model."
PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save"
NAMED = re.compile(rf"\.({PARTS})\.(?!weight$|bias$)(\w+)(?=\.|$)")
"""A part of a LoRA layer with the adapter's name after it, as in a model's own state_dict."""


def respell(name: str) -> str:
    """Return a tensor's name as PEFT saves it."""
    name = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)", r"\1", name)
    name = re.sub(r"\.{2,}", ".", name).lstrip(".")
    name = re.sub(r"^module\.(?=base_model\.|model\.|transformer\.)", "", name)
    name = name[max(name.find(PREFIX), 0) :]  # an adapter inside another module
    if not name.startswith("base_model."):
        name = PREFIX + name
    name = NAMED.sub(r".\1", name)
    if name.endswith(".lora_magnitude_vector.weight"):
        name = name.removesuffix(".weight")
    return name.replace(".modules_to_save.", ".").removesuffix(".modules_to_save")


def respell_folder(folder: Path, names: Iterable[str]) -> Path:
    """Return the folder of an adapter with its tensors, called `names`, under PEFT's names:
    `folder` where they are; else a copy, which is gone when the process ends."""
    spelled = {name: respell(name) for name in names}
    if all(name == new for name, new in spelled.items()):
        return folder
    if len(set(spelled.values())) < len(spelled):
        return folder  # two would be one: for PEFT to refuse
    copy = files.make_passing_folder() / folder.resolve().name
    show_as(copy, folder)
    ignored = shutil.ignore_patterns(
        "*.safetensors", "*.pt", "*.pth", "*.bin", "checkpoint-*", ".*"
    )
    shutil.copytree(folder, copy, ignore=ignored)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {spelled[name]: tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    first = next(name for name, new in spelled.items() if name != new)
    ui.say(f"{folder}: its tensors are read under PEFT's names ({first} as {spelled[first]})")
    return copy
