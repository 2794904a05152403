"""Read a saved adapter once: check its folder, and resolve the base it was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import (
    LoraError,
    UsageError,
    plain_files,
    privacy,
    provenance,
    quote,
    read_json,
    ui,
)
from lora_cli.models import (
    adapter_config,
    adapter_names,
    fingerprint,
    gguf_base,
    names,
    processor,
    quantised,
    source,
    tokenizer,
)
from lora_cli.models.base import Base
from lora_cli.models.head import CONFIG, HeadSettings, read_settings
from lora_cli.models.loaded import is_quantised
from lora_cli.models.probes import TRAINED
from lora_cli.models.record import GGUFSource, RecordedRecipe, TrainingRecord
from lora_cli.recipe import DEFAULT_TASK, Task, find_task

UNSAFE = "which may run code when it is loaded"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    processor.FILE,
)


COUNTED = ".num_batches_tracked"
"""The end of the name of BatchNorm's only tensor of whole numbers."""


@dataclass(frozen=True)
class Adapter:
    """A saved adapter folder, the base it names, and our record of its training (None for one made
    elsewhere)."""

    folder: Path
    base: Base
    record: TrainingRecord | None
    shares_base: bool
    """Whether other adapters may lie on the same loaded base: this one leaves the base's own
    weights as they are."""
    hub_name: str | None = None
    """What it is called on the hub, where `folder` is in the hub's cache."""
    given: Path | None = None
    """The folder that was given, where `folder` is a copy of it with other names of tensors."""
    replaced: Base | None = None
    """The quantised base that it was trained on, where `base` is given in its place and is not
    quantised."""

    def __str__(self) -> str:
        return self.hub_name or str(self.given or self.folder)

    @property
    def recipe(self) -> RecordedRecipe:
        """The resolved recipe it was trained with; empty for an adapter made elsewhere."""
        return self.record.recipe if self.record else RecordedRecipe()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The 4-bit storage that training put the base's weights into; None where it took them as
        the files have them."""
        kept = self.recipe.quantization
        if kept is None or self.replaced or self.base.quantised:
            return None
        return kept.collect_values()

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that the trained answers ended with."""
        return self.record.data.stop_token_ids if self.record and self.record.data else []

    @property
    def trained_dtype(self) -> torch.dtype:
        """The type the base's weights had in training; that of its files for an adapter made
        elsewhere."""
        dtype = self.recipe.model.dtype
        return getattr(torch, dtype) if dtype else self.base.dtype

    @property
    def trained_on(self) -> str:
        """The kind of device that it was trained on, as torch names it; `cpu` where that was not
        recorded."""
        device = self.record.device if self.record else None
        return device.kind if device else "cpu"

    def refuse_other_base(self) -> None:
        """Raise LoraError naming what differs where the base is not the one that the adapter was
        trained on.

        An adapter made elsewhere, or before fingerprints were kept, says nothing of its base; one
        in the place of a quantised one must be what that was made from.
        """
        if self.replaced:
            source.refuse_other_source(self.replaced, self.base)
            return
        kept = self.record.base.fingerprint if self.record else None
        now = self.base.fingerprint if kept else {}
        different = fingerprint.list_differences(kept.to_data(), now) if kept else []
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise LoraError(
                f"{self.base} is not the base that {self} was trained on: "
                f"{', '.join(different[:3])}{more} "
                "differ",
                "the base has changed since: --base gives the one it was trained on",
            )

    def load_base(self, original: bool = False) -> PreTrainedModel:
        """Load the base as the adapter was trained on it: same revision, type, quantisation; a
        foreign one as its files are. `original` leaves the quantisation out. Raises LoraError where
        it is not the base that was trained on."""
        self.refuse_other_base()
        settings, kept = None, self.recipe.quantization
        if kept and (self.base.quantised or self.quantization and not original):
            settings = BitsAndBytesConfig(load_in_4bit=True, **kept.collect_values())
        return self.base.load(self.trained_dtype, settings)

    def load_plain_base(self, original: bool = False) -> PreTrainedModel:
        """Load the same base with plain weights on the CPU: dequantised where it is quantised, by a
        GPU where there is one; all of it in float32 may not fit there."""
        if self.base.quantised:
            self.refuse_other_base()
            return self.base.load_plain(self.trained_dtype)
        network = self.load_base(original)
        return network.dequantize().to("cpu") if is_quantised(network) else network

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with it."""
        return (self.folder / "tokenizer_config.json").is_file()

    def load_tokenizer(self, **roles: str | None) -> PreTrainedTokenizerBase:
        """Load the tokenizer saved with the adapter, with the template that was trained; else the
        base's. `roles` are those of `tokenizer.load_tokenizer`."""
        if self.has_tokenizer:
            found = tokenizer.load_tokenizer(str(self.folder), **roles)
        else:
            found = self.base.load_tokenizer(**roles)
        tokenizer.leave_out_inputs(found, self.base.task)
        return found

    def load_reader(self) -> processor.Reader:
        """Load what reads its input, as it was trained: a tokenizer, or an image processor."""
        if not self.base.task.reads_pictures:
            return self.load_tokenizer()
        if (self.folder / processor.FILE).is_file():
            return processor.load_processor(str(self.folder))
        return self.base.load_reader()


def read_adapter(path: Path, base: str | None = None) -> Adapter:
    """Read and check the adapter in a folder, or called so on the hub; `base` overrides the base it
    names. Raises LoraError if it is not an adapter."""
    if base is not None and not base.strip():
        raise UsageError("--base is empty", "leave it out, or --base MODEL")
    if base is not None and plain_files.is_gguf(base):
        base = Base(base).resolve().name
    hub_name = str(path) if names.may_be_adapter_on_hub(path) else None
    folder = _download(hub_name) if hub_name else path
    _refuse_no_adapter(folder)
    plain_files.refuse_odd_files(folder)
    shapes = _check_weights(folder, hub_name)
    respelled = _respell(folder, (folder / ADAPTER_FILES[1]).stat().st_mtime_ns)
    config = _read_config(
        folder, {adapter_names.respell(name): shape for name, shape in shapes.items()}
    )
    record = _read_record(folder)
    named = _choose_base(hub_name or str(folder), base, config, record)
    task = _find_task(config)
    named = replace(named, task=task, head_settings=_find_settings(folder, shapes, task, record))
    given = folder if respelled != folder else None
    replaced = _find_replaced(named, config, record) if base is not None else None
    found = Adapter(respelled, named, record, not _changes_base(config), hub_name, given, replaced)
    _warn_of_no_change(respelled, str(found))
    return found


def _find_task(config: Mapping[str, Any]) -> Task:
    """Return the task of an adapter by its configuration: PEFT names the class of the base where it
    has no name for the task."""
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return find_task(config.get("task_type"), str(kind)) or DEFAULT_TASK


def _find_settings(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], task: Task, record: TrainingRecord | None
) -> HeadSettings | None:
    """Return what the head of the adapter knows: of a checkpoint, which has no config.json, what
    the record of its run says."""
    told = record.recipe.model if record and task.counts_labels else None
    if told and isinstance(told.labels, list) and not (folder / CONFIG).is_file():
        return HeadSettings(tuple(told.labels), told.problem_type)
    return read_settings(folder, shapes, task)


@cache
def _respell(folder: Path, _written: int) -> Path:
    """Return the folder with PEFT's names of tensors; a copy is made once for weights that were
    written at a time."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        return adapter_names.respell_folder(folder, list(stored.keys()))


@cache
def _warn_of_no_change(folder: Path, name: str) -> None:
    """Warn, once, of an adapter that leaves its base as it is: every B is zero, and there is
    nothing but A and B."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            plain = re.search(r"\.lora_(embedding_)?([AB])(\.weight)?$", key)
            if plain is None or (plain[2] == "B" and stored.get_tensor(key).any()):
                return
    ui.warn(f"{name} changes nothing: every B is zero, so that it equals its base")


@cache
def _download(name: str) -> Path:
    """Return the folder in the hub's cache with the adapter's files, all of one commit."""
    names.refuse_unreachable(name)
    try:
        commit = names.find_adapter_commit(name)
    except RemoteEntryNotFoundError as error:
        raise LoraError(
            f"{name} is not an adapter: it has no adapter_config.json", "give an adapter"
        ) from error
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise LoraError(
            f"{name} does not exist, neither here nor on the hub",
            plain_files.suggest_other(Path(name)),
        ) from error
    except LocalEntryNotFoundError as error:
        raise LoraError(
            f"{name} does not exist here, and the hub cannot be reached",
            plain_files.suggest_other(Path(name)),
        ) from error
    wanted = [*ADAPTER_FILES, CONFIG, *TOKENIZER_FILES, provenance.ARTEFACT_RECORD, TRAINED]
    return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))


def _refuse_no_adapter(folder: Path) -> None:
    """Raise LoraError where the path is not a folder with an adapter's configuration."""
    if folder.is_file():
        raise LoraError(
            f"{folder} is a file, and an adapter is a folder", f"ls {quote(folder.parent)}"
        )
    if not folder.is_dir():
        raise LoraError(f"{folder} does not exist", plain_files.suggest_other(folder))
    if not (folder / "adapter_config.json").is_file():
        inside = names.find_adapter_inside(folder)
        hint = f"did you mean {quote(inside)}?" if inside else "give the adapter's folder"
        raise LoraError(f"{folder} is not an adapter: it has no adapter_config.json", hint)


def _read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read adapter_config.json and refuse what cannot be a LoRA or DoRA adapter with tensors of
    these shapes."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    if not isinstance(config, dict):
        raise LoraError(f"{file} is not an adapter configuration", "copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise LoraError(
            f"{folder} holds a {config.get('peft_type')} adapter, not LoRA or DoRA",
            "use PEFT itself",
        )
    adapter_config.check_fields(file, config)
    adapter_config.refuse_other_task(folder, config.get("task_type"))
    adapter_config.refuse_other_ranks(folder, config, shapes)
    return config


def _read_record(folder: Path) -> TrainingRecord | None:
    """Read our record of the adapter's training; a checkpoint of a run has it one folder up."""
    places = [folder / provenance.ARTEFACT_RECORD]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent / provenance.RUN_RECORD)
    return next((TrainingRecord.read(place) for place in places if place.is_file()), None)


def _choose_base(
    adapter: str, base: str | None, config: dict[str, Any], record: TrainingRecord | None
) -> Base:
    """Choose the base: as given, else as the adapter and the record name it. Raises LoraError where
    that cannot be a model."""
    named = config.get("base_model_name_or_path")
    if record and base is None:
        recorded = privacy.make_portable(record.base.name)
        adapter_config.refuse_other_base(adapter, privacy.make_portable(named), recorded)
    name = privacy.expand_home(base or named or "")
    source = record.base.made_from if record and base is None else None
    if source and not Path(name).is_dir():
        name = str(gguf_base.find_again(source) or name)
    if not name:
        raise LoraError(f"{adapter} does not name its base model", "--base MODEL")
    revision = None
    if base is None:
        revision = (record.base.commit if record else None) or config.get("revision")
    if record and base is None and record.base.commit is None and not Path(name).is_dir():
        _refuse_missing_base(adapter, name, source)
    if not names.may_be_model(name):
        raise LoraError(f"the base of {adapter}, {name}, is not a model", "--base MODEL")
    if record is None and base is None:
        adapter_config.announce_base(adapter, name, revision)
    return Base(name, revision)


def _refuse_missing_base(adapter: str, folder: str, source: GGUFSource | None) -> NoReturn:
    """Raise LoraError for a base that is a folder, or a GGUF file, and not here."""
    if source is not None:
        raise LoraError(
            f"the base of {adapter}, {source.file}, is not here, or not the file any more that was "
            f"trained on (sha256 {source.sha256})",
            "--base FILE.gguf",
        )
    raise LoraError(
        f"the base of {adapter}, the folder {folder}, is not here",
        "--base MODEL, or run this where it is",
    )


def _find_replaced(
    given: Base, config: Mapping[str, Any], record: TrainingRecord | None
) -> Base | None:
    """Return the quantised base that an adapter was trained on where `given`, which is not
    quantised, is to take its place; of one made elsewhere, if that base is at hand."""
    name = privacy.expand_home(config.get("base_model_name_or_path") or "")
    if not name:  # which as a path would be the current folder
        return None
    if record:
        before = Base(name, record.base.commit)
        settings = record.base.fingerprint.config if record.base.fingerprint else {}
        was_quantised = any(settings.get(field) for field in quantised.FIELDS)
    else:
        before = Base(name, config.get("revision"))
        was_quantised = before.is_at_hand() and before.quantised is not None
    return before if was_quantised and given.quantised is None else None


def _changes_base(config: dict[str, Any]) -> bool:
    """Return whether the adapter changes the base's own weights or size while it is on it."""
    starts_otherwise = isinstance(config.get("init_lora_weights"), str)
    return (
        config.get("bias", "none") != "none"
        or starts_otherwise
        or bool(config.get("kasa_config"))
        or bool(config.get("trainable_token_indices"))
    )


def _check_weights(folder: Path, hub_name: str | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapter's tensors. Raises LoraError unless its weights are complete,
    and not pickled."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = next(
            (file for kind in names.PICKLED for file in sorted(folder.glob(f"*{kind}"))), None
        )
        hint = "copy it again"
        if pickled:
            hint = f"{pickled.name} is a pickle, {UNSAFE}: have it converted to safetensors"
        elif hub_name:
            hint = f"if the hub has it as a pickle (.bin), {UNSAFE}: ask its owner for safetensors"
        raise LoraError(f"{hub_name or folder} has no adapter_model.safetensors", hint)
    try:
        with safe_open(weights, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            whole = [
                name
                for name, each in slices.items()
                if "F" not in each.get_dtype() and not name.endswith(COUNTED)
            ]
    except SafetensorError as error:
        raise LoraError(f"{weights} is damaged or cut off: {error}", "copy it again") from error
    if not shapes:
        raise LoraError(f"{weights} holds no tensors", "copy it again, or train again")
    if whole:
        raise LoraError(
            f"{weights}: {whole[0]} holds whole numbers, as no adapter does", "copy it again"
        )
    return shapes
