"""What produced an artefact: the run's record, and what a saved adapter says of itself.

`record.json` in a run's folder holds the resolved recipe, the choices `auto` made, versions, base, data and results;
a copy, `lora_record.json`, travels inside the adapter and names the parent of whatever is made from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lora_cli.common import privacy, provenance
from lora_cli.common.errors import LoraError, UsageError
from lora_cli.common.files import read_json
from lora_cli.models import adapter_config

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Adapter(NamedTuple):
    """A saved adapter folder: the base it names, and how that base was loaded if we trained it (else None)."""

    folder: Path
    base: str
    revision: str | None
    record: dict[str, Any] | None
    shares_base: bool

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe it was trained with; empty for an adapter made elsewhere."""
        return self.record["recipe"] if self.record else {}

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The 4-bit storage of the base it was trained on."""
        return self.recipe.get("quantization")

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that the trained answers ended with."""
        return list(self.record.get("data", {}).get("stop_token_ids", [])) if self.record else []

    @property
    def dtype(self) -> str | None:
        """The type of the base weights it was trained on."""
        return self.recipe.get("model", {}).get("dtype")


def read_adapter(folder: Path, base: str | None = None) -> Adapter:
    """What the adapter in `folder` says of itself; `base` overrides the base it names. LoraError if it is none."""
    if base is not None and not base.strip():
        raise UsageError("--base is empty", "leave it out, or --base MODEL")
    if folder.is_file():
        raise LoraError(f"{folder} is a file, and an adapter is a folder", f"ls {folder.parent}")
    if not folder.is_dir():
        raise LoraError(f"{folder} does not exist", f"ls {folder.parent}")
    if not (folder / "adapter_config.json").is_file():
        inside = folder / "adapter"
        hint = f"did you mean {inside}?" if (inside / "adapter_config.json").is_file() else "give the adapter's folder"
        raise LoraError(f"{folder} is no adapter: it has no adapter_config.json", hint)
    shapes = _check_weights(folder)
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise LoraError(f"{folder / 'adapter_config.json'} is no adapter configuration", "copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise LoraError(f"{folder} holds a {config.get('peft_type')} adapter, not LoRA or DoRA", "use PEFT itself")
    adapter_config.check_fields(folder / "adapter_config.json", config)
    adapter_config.refuse_other_task(folder, config.get("task_type"))
    adapter_config.refuse_other_ranks(folder, config, shapes)
    # a checkpoint of a run has its record one folder up
    places = [
        folder / provenance.ARTEFACT_RECORD,
        *([folder.parent / provenance.RUN_RECORD] if folder.name.startswith("checkpoint-") else []),
    ]
    record = next((provenance.read_record(place) for place in places if place.is_file()), None)
    named = config.get("base_model_name_or_path")
    if record and base is None:
        adapter_config.refuse_other_base(
            folder, privacy.make_portable(named), privacy.make_portable(record["base"].get("name"))
        )
    name = privacy.expand_home(base or named or "")
    if not name:
        raise LoraError(f"{folder} does not name its base model", "--base MODEL")
    revision = None
    if base is None:
        revision = (record["base"]["commit"] if record else None) or config.get("revision")
    if record and base is None and record["base"]["commit"] is None and not Path(name).is_dir():
        raise LoraError(
            f"the base of {folder}, the folder {name}, is not here", "--base MODEL, or run this where it is"
        )
    if not _may_be_model(name):
        raise LoraError(f"the base of {folder}, {name}, is no model", "--base MODEL")
    if record is None and base is None:
        adapter_config.announce_base(folder, name, revision)
    # these change the base's own weights or size while they are on it, so another adapter must not share it
    changes_base = config.get("bias", "none") != "none" or isinstance(config.get("init_lora_weights"), str)
    changes_base |= bool(config.get("trainable_token_indices"))
    return Adapter(folder, name, revision, record, not changes_base)


def _check_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's tensors; LoraError unless its weights are there, whole, and not pickled."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = next((file for kind in PICKLED for file in sorted(folder.glob(f"*{kind}"))), None)
        hint = (
            f"{pickled.name} is a pickle, which may run code when it is loaded: have it converted to safetensors"
            if (pickled)
            else "copy it again"
        )
        raise LoraError(f"{folder} has no adapter_model.safetensors", hint)
    try:
        with safe_open(weights, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            whole = [name for name, each in slices.items() if "F" not in each.get_dtype()]
    except SafetensorError as error:
        raise LoraError(f"{weights} is damaged or cut off: {error}", "copy it again") from error
    if not shapes:
        raise LoraError(f"{weights} holds no tensors", "copy it again, or train again")
    if whole:
        raise LoraError(f"{weights}: {whole[0]} holds whole numbers, as no adapter does", "copy it again")
    return shapes


def _may_be_model(name: str) -> bool:
    """Whether `name` is a model's folder, or may be a name on the hub: no other folder, no file, no longer path."""
    path = Path(name)
    if path.exists():
        return (path / "config.json").is_file()
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def classify(path: str) -> str:
    """`gguf`, `adapter`, `model` (a folder) or `hub` for what a path on the command line is; LoraError if nothing."""
    local = Path(path)
    if not path.strip():
        raise UsageError("an empty name is no model", "give a folder, a .gguf file or a model on the hub")
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
        hint = f"did you mean {inside}?" if inside.is_dir() else "give a folder with config.json or adapter_config.json"
        raise LoraError(f"{path} is neither a model nor an adapter", hint)
    if local.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise LoraError(f"{path} does not exist or is no model", "give a folder, a .gguf file or a model on the hub")
    return "hub"
