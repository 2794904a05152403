"""A base model: a folder, or a name on the hub at one revision; what is read of it is read once.

Everything of a run is loaded at one commit, and merging loads the base at it again.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lora_cli.common import LoraError, devices, library_errors, plain_files, remote_code
from lora_cli.models import (
    dequantised,
    empty,
    fingerprint,
    four_bit,
    gguf_base,
    gguf_kept,
    hub,
    names,
    processor,
    quantised,
    settings,
    tensors,
    ties,
    tokenizer,
)
from lora_cli.models.config import get_checkpoint_dtype, load_config, read_field
from lora_cli.models.head import Head, HeadSettings, find_head, list_lacking
from lora_cli.models.loaded import is_quantised
from lora_cli.models.quantised import Quantised
from lora_cli.models.record import GGUFSource
from lora_cli.models.tensors import Tensors
from lora_cli.recipe import DEFAULT_TASK, Recipe, Task, recognise_task

PACKED = 16
"""A number in a file may hold so many weights: an int32 holds 16 of two bits."""


GENERATION_CONFIG = "generation_config.json"
TIED = "tie_word_embeddings"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Base:
    """A base model by its name (a folder, or a name on the hub) and, on the hub, a revision of
    it."""

    name: str
    revision: str | None = None
    task: Task = DEFAULT_TASK
    head_settings: HeadSettings | None = None
    """What the head of a task other than writing has to know beside its configuration."""

    def __post_init__(self) -> None:
        """Refuse a folder, or a cached one of the hub, with other than plain files in it; a base
        that lora keeps is not removed as long as this process lives."""
        folder = self._find_folder()
        if folder is not None:
            plain_files.refuse_odd_files(folder)
            gguf_kept.hold(folder)

    def __str__(self) -> str:
        return self.name

    def _find_folder(self) -> Path | None:
        """Return where its files are on this machine; None where they are not."""
        if self.is_folder:
            return Path(self.name)
        if not names.is_hub_name(self.name):
            return None
        cached = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return Path(cached).parent if isinstance(cached, str) else None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Base:
        """Return the base of a recipe, its revision resolved and its configuration read; LoraError
        names the key, and one for a base that is quantised so that the recipe's method does not
        train on it."""
        try:
            named = recipe.model.name_or_path, recipe.model.revision
            base = cls(*named, recipe.task_row, _read_head_settings(recipe)).resolve()
            stored = base.quantised  # what is wrong with its configuration is said of the key
        except LoraError as error:
            if error.message.startswith("model."):
                raise
            raise error.with_message(f"model.name_or_path: {error.message}") from error
        if stored is not None:
            quantised.refuse_untrainable(recipe, base.name, stored)
        return base

    def resolve(self) -> Base:
        """Return the base with the commit that its revision stands for now; a folder has none. Of a
        GGUF file, it is the folder that the file is dequantised into.

        Raises LoraError when the name is neither of these nor a name on the hub; the hub's
        own errors when it does not know the name or revision.
        """
        kind = names.classify(self.name)
        if kind == "gguf":
            return replace(self, name=str(gguf_base.dequantise(Path(self.name))), revision=None)
        if kind == "model":
            return replace(self, revision=None)
        if kind != "hub":
            raise LoraError(
                f"{self.name} is not a base model",
                "give a folder with config.json, a .gguf file or a name on the hub",
            )
        with names.explain_hub_failure(self.name):
            return replace(self, revision=hub.resolve_commit(self.name, self.revision))

    @classmethod
    def of_model(cls, name: str, revision: str | None = None) -> Base:
        """Return a whole model, with the task that its configuration names."""
        config = load_config(name, revision)
        return cls(name, revision, recognise_task(config.architectures))

    @property
    def is_folder(self) -> bool:
        """Whether the name is a folder on this machine."""
        return Path(self.name).is_dir()

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its configuration, with the type of its weights where the file names none, and what the
        head of its task has to know. Copy it before changing it."""
        config = load_config(self.name, self.revision)
        if not self.task.writes_next_tokens:
            (self.head_settings or HeadSettings()).write_into(config)
        if self.task.num_outputs is not None:
            outputs = range(self.task.num_outputs)  # and not the labels of another task's head
            HeadSettings(tuple(f"LABEL_{number}" for number in outputs)).write_into(config)
        return config

    @cached_property
    def head(self) -> Head:
        """What the class of its task has and its files lack. Raises LoraError where that is a part
        of the base itself."""
        if self.task.writes_text:
            return Head((), ())
        network, report = self._load_and_report(
            dtype=self.dtype, config=copy.deepcopy(self.config), device_map="meta"
        )
        return find_head(network, report, self.task, self.name)

    @cached_property
    def lacking(self) -> list[str]:
        """The parameters that the class of its task has and its files lack; an adapter has to have
        them, or they are random."""
        if self.task.writes_next_tokens:
            return []
        return list_lacking(
            *self._load_and_report(
                dtype=self.dtype, config=copy.deepcopy(self.config), device_map="meta"
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type its weights have on disk (float32 when the configuration does not say, and for
        float64)."""
        return get_checkpoint_dtype(self.config)

    @property
    def made_from(self) -> GGUFSource | None:
        """The GGUF file that it was dequantised from; None for any other base."""
        return gguf_kept.read_source(self.name)

    def to_record(self) -> dict[str, Any]:
        """Return what the record of a run or an adapter says of its base."""
        source = self.made_from
        return {
            "name": self.name,
            "commit": self.revision,
            "fingerprint": self.fingerprint,
            **({"made_from": source.to_data()} if source else {}),
        }

    @cached_property
    def quantised(self) -> Quantised | None:
        """How its files keep the weights quantised; None where they are plain."""
        return quantised.find_quantised(self.config)

    def describe(self) -> str:
        """Return its name, and how it is quantised already, or was."""
        stored, source = self.quantised, self.made_from
        if stored is None:
            return f"{Path(source.file).name} ({source.type}), dequantised" if source else self.name
        loaded = ", dequantised as it is loaded" if stored.is_dequantised else ""
        return f"{self.name}, already quantised ({stored}){loaded}"

    @cached_property
    def stored(self) -> Tensors | None:
        """The tensors of its safetensors files, as they are; None where it has no such files."""
        return tensors.open_model(self.name, self.revision)

    @cached_property
    def tensors(self) -> Tensors | None:
        """The same, dequantised as they are read where the files hold them quantised and that is
        known here."""
        if self.stored is None or self.quantised is None:
            return self.stored
        return dequantised.read_dequantised(self.stored, self.quantised)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from another base: its configuration, and a short hash of each tensor."""
        return fingerprint.fingerprint_model(self.name, self.revision, self.stored)

    @cached_property
    def generation_settings(self) -> dict[str, Any]:
        """What its generation_config.json asks of those who write with it; nothing without one."""
        found = settings.read_settings(self.name, self.revision, GENERATION_CONFIG)
        return {key: value for key, value in found.items() if key not in fingerprint.VOLATILE}

    def is_at_hand(self) -> bool:
        """Return whether its configuration and weights are on this machine."""
        if self.is_folder:
            return (Path(self.name) / "config.json").is_file()
        if not names.is_hub_name(self.name):
            return False
        return all(
            any(
                isinstance(try_to_load_from_cache(self.name, file, revision=self.revision), str)
                for file in files
            )
            for files in (["config.json"], [tensors.SINGLE, tensors.INDEX])
        )

    def is_readable(self) -> bool:
        """Return whether it is on this machine, and its weights are plain or can be dequantised."""
        if not self.is_at_hand() or self.tensors is None:
            return False
        return self.quantised is None or self.quantised.is_mergeable

    def download(self) -> Path:
        """Return the folder with its files: its own, or that of the hub's cache."""
        return Path(
            self.name if self.is_folder else snapshot_download(self.name, revision=self.revision)
        )

    @property
    def exact_dtype(self) -> torch.dtype:
        """The type that holds the values of its weights: float32 where they are dequantised as
        they are loaded, else the one they have on disk."""
        stored = self.quantised
        return torch.float32 if stored and stored.is_dequantised else self.dtype

    @property
    def parted(self) -> tuple[str, ...]:
        """Parameters of a model that writes which its configuration ties and its files hold apart;
        none of one without an encoder whose files are not on this machine."""
        looked_at = self.task.has_targets or (self.task.writes_text and self.is_at_hand())
        return self._parted if looked_at else ()

    @cached_property
    def _parted(self) -> tuple[str, ...]:
        parts = (self.config, self.config.get_text_config())
        ties_none = not self.task.has_targets and not any(read_field(each, TIED) for each in parts)
        if ties_none or self.tensors is None:
            return ()
        return ties.find_parted(empty.build_empty(self.config, self.task), self.tensors)

    def _part(self, network: PreTrainedModel) -> PreTrainedModel:
        ties.part(network, self.parted)
        return network

    def build_empty(self) -> PreTrainedModel:
        """Build it without weights (on the `meta` device): its modules' names and shapes, in an
        instant."""
        return self._part(empty.build_empty(self.config, self.task))

    def build_zero(self) -> PreTrainedModel:
        """Build it with zeros for weights, each tensor one number in memory: a place for adapters
        to be read on."""
        return empty.build_zero(self.config, self.task, self.parted)

    def build_unweighted(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Build it in float32 without parameters, and with the buffers that are computed, for rows
        to be read in; `config`: by another configuration than its own."""
        return self._part(empty.build_unweighted(config or self.config, self.task))

    def load_tokenizer(self, **roles: str | None) -> PreTrainedTokenizerBase:
        """Load its tokenizer, as `tokenizer.load_tokenizer`."""
        return tokenizer.load_tokenizer(self.name, self.revision, **roles)

    def load_reader(self) -> processor.Reader:
        """Load what reads its input: its tokenizer, or, for pictures, its image processor."""
        if self.task.reads_pictures:
            return processor.load_processor(self.name, self.revision)
        return self.load_tokenizer()

    def load(
        self,
        dtype: torch.dtype | None = None,
        quantization: BitsAndBytesConfig | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load it in `dtype` (default: its own), or in 4 bits with `dtype` for what is not
        quantised, straight to `device` (default: 4 bits where they are computed, else the CPU).
        A base that is quantised already stays as it is, or is dequantised on the way;
        4-bit weights are computed in the type that `quantization` says.

        `kwargs` go to from_pretrained. Raises LoraError where its files lack or misshape a weight,
        or transformers cannot load what they hold.
        """
        kwargs |= self._choose_storage(quantization, device)
        self.refuse_without_safetensors()
        self.refuse_odd_generation()
        self._refuse_more_than_stored()
        if not self.task.writes_next_tokens:
            kwargs.setdefault("config", copy.deepcopy(self.config))
        network, report = self._load_and_report(dtype=dtype or self.dtype, **kwargs)
        if self.task.writes_text:
            self._refuse_misfits(report)
            ties.keep_apart(network, ties.find_left_apart(network))
        else:
            find_head(network, report, self.task, self.name)
        if is_quantised(network):
            four_bit.keep_4bit_weights_unpacked(network)
            four_bit.refuse_misread_rows(network, self.name, self.quantised is not None)
        return network

    def _load_and_report(self, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the model, and what transformers says of its files."""
        return self.task.find_auto_class(self.config).from_pretrained(
            self.name,
            revision=self.revision,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=remote_code.is_allowed(),
            ignore_mismatched_sizes=True,  # so that the report, which is looked at, has them
            **kwargs,
        )

    def load_plain(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load it with plain weights, dequantised where its files hold them quantised. Raises
        LoraError where transformers cannot do that."""
        if self.quantised is None:
            return self.load(dtype)
        quantised.refuse_undequantisable(self.name, self.quantised)
        network = self.load(dtype)
        if is_quantised(network):
            network = network.dequantize().to("cpu")
        network._weight_conversions = None  # save_pretrained would quantise the weights again
        return network

    def _choose_storage(
        self, quantization: BitsAndBytesConfig | None, device: torch.device | None
    ) -> dict[str, Any]:
        """Return what from_pretrained is told of how weights are, or are to be, stored, and where.

        Not even None may be given for a base that is quantised: it would be loaded as if it were
        not.
        """
        chosen: dict[str, Any] = {}
        in_4bit = quantization is not None
        if self.quantised is not None:
            quantised.refuse_unloadable(self.name, self.quantised)
            compute = quantization.bnb_4bit_compute_dtype if quantization else None
            chosen["config"] = quantised.config_for_loading(self.config, compute)
            in_4bit = not self.quantised.is_dequantised
        elif quantization is not None:
            chosen["quantization_config"] = quantization
        if in_4bit:
            self._refuse_conv1d()
            device = device or devices.find_device(in_4bit=True)
        # left to itself, bitsandbytes takes a GPU that is there
        stays = in_4bit and torch.accelerator.is_available()
        if device is not None and (device.type != "cpu" or stays):
            chosen["device_map"] = {"": device}
        return chosen

    def refuse_without_safetensors(self) -> None:
        """Raise LoraError where its weights are absent or pickled, or where it is a base and an
        adapter at once."""
        folder = Path(self.name)
        if (
            folder / "adapter_config.json"
        ).is_file():  # transformers would load the base that it names instead
            raise LoraError(
                f"{self.name} is an adapter as well as a base",
                f"move {self.name}/adapter_*.* to another folder",
            )
        if self.tensors is not None:
            return
        pickled = sorted(file.name for kind in names.PICKLED for file in folder.glob(f"*{kind}"))
        only = (
            f": it has pickled ones ({pickled[0]}), which may run code when they are loaded"
            if pickled
            else ""
        )
        raise LoraError(
            f"{self.name} has no weights in safetensors files{only}",
            "take a revision or copy that has model.safetensors",
        )

    def refuse_odd_generation(self) -> None:
        """Raise LoraError where generation_config.json is there and cannot be read, or names tokens
        by what is no number."""
        file = GENERATION_CONFIG
        if settings.read_settings(self.name, self.revision, file):
            with library_errors.translate_file_errors(
                f"transformers cannot read {file} of {self.name}", "copy it again"
            ):
                read = GenerationConfig.from_pretrained(self.name, revision=self.revision)
            for field in TOKEN_FIELDS:
                _refuse_odd_tokens(f"{self.name}/{file}: {field}", getattr(read, field))

    def _refuse_more_than_stored(self) -> None:
        """Raise LoraError where the configuration asks for many times what the files hold: memory
        would be taken for all of it before it is missed."""
        assert self.stored is not None, "refused without"
        held = sum(math.prod(entry.shape) for entry in self.stored.entries.values())
        asked = {key: weight for key, weight in self.build_empty().named_parameters()}
        wanted = sum(weight.numel() for weight in asked.values())
        if wanted > PACKED * held:
            key = max(asked, key=lambda key: asked[key].numel())
            shape = tuple(asked[key].shape)
            raise LoraError(
                f"{self.name}/config.json asks for {wanted:,} weights, {key} of {shape} among "
                f"them, and the files hold {held:,}",
                "config.json and the weights must be of one model",
            )

    def _refuse_conv1d(self) -> None:
        if any(isinstance(module, Conv1D) for module in self.build_empty().modules()):
            raise LoraError(
                f"{self.name} stores its weights transposed (Conv1D), and 4-bit storage "
                "reads them back wrongly",
                "--set method=lora, or method=dora",
            )

    def _refuse_misfits(self, report: dict[str, Any]) -> None:
        """Refuse what transformers says in a log only: it fills weights that the files lack with
        random numbers."""
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[what])
            if keys:
                raise LoraError(
                    f"the weights of {self.name} do not fit its configuration: {len(keys)} "
                    f"{what.replace('_', ' ')}, "
                    f"such as {keys[0]}",
                    "config.json and the weights must be of one model",
                )


def _read_head_settings(recipe: Recipe) -> HeadSettings | None:
    """Return what a settled recipe says of its model's head."""
    if recipe.task_row.writes_next_tokens:
        return None
    labels, problem = recipe.model.labels, recipe.model.problem_type
    return HeadSettings(
        () if labels == "auto" else tuple(labels), None if problem == "auto" else problem
    )


def _refuse_odd_tokens(field: str, given: Any) -> None:
    ids = given if isinstance(given, list) else [given]
    if given is not None and any(type(each) is not int or not -1 <= each < 2**31 for each in ids):
        raise LoraError(
            f"{field} is {str(given)[:80]}, not the number of a token", "copy the file again"
        )
