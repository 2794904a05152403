"""Open models that tell something of rows: adapters, which share their base, and whole models.

A base is loaded once, in the type that training had. Each adapter lies on a twin of it: modules of
its own over the same weights. So adapters have heads of any number of labels, and none has to be
switched off for another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.common import LoraError, UsageError, quote, ui
from lora_cli.models import (
    Adapter,
    Base,
    PictureProcessor,
    Reader,
    RecordedRecipe,
    attach,
    find_positions,
    names,
    read_adapter,
    read_logits,
    read_merged_recipe,
    refuse_not_finite,
    to_accelerator,
)
from lora_cli.recipe import Task
from lora_cli.scoring import losses
from lora_cli.speed import dora_norms

UNNAMED = "LABEL_"
"""What transformers calls labels that nobody has named, with a number."""


@dataclass
class Opened:
    """A model that is ready to be asked, with what its rows are made by."""

    name: str
    """As it was given on the command line."""
    network: PreTrainedModel | PeftModel
    base: Base
    reader: Any
    """Its tokenizer, or its image processor."""
    recorded: Mapping[str, Any]
    """The section `data` of the recipe that it was trained by; empty where that is not known."""
    trained_length: int | None
    """That recipe's training.max_length."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What reads texts for it."""
        return self.reader

    @property
    def task(self) -> Task:
        """What it does with its input."""
        return self.base.task

    @property
    def labels(self) -> list[str]:
        """What it tells apart, in the order of its outputs."""
        found = self.network.config.id2label
        return [str(found[number]) for number in sorted(found)]

    @property
    def type_name(self) -> str:
        """The type that it computes in."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def problem_type(self) -> str:
        """What its labels are: of models made elsewhere, whose configuration may leave that open, a
        single output is a measured value, as in transformers."""
        given = self.network.config.problem_type
        return given or (losses.NUMBERS if len(self.labels) == 1 else "single_label_classification")

    def find_limit(self, asked: int | None) -> int | None:
        """Return how many tokens a row may have: as many as are asked for, or as in training, and
        no more than the model reads; None where nothing limits it. Raises UsageError where more are
        asked for."""
        positions = find_positions(self.base)
        most = [positions.number] if positions else []
        if SMALLEST <= self.tokenizer.model_max_length < LARGEST:
            most.append(self.tokenizer.model_max_length)
        if asked and positions and positions.ends and asked > min(most):
            raise UsageError(
                f"--max-length {asked}: {self.name} reads {min(most)} tokens",
                f"--max-length {min(most)}, or leave it out",
            )
        return asked or min([*most, *filter(None, [self.trained_length])], default=None)

    def compute(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """Return what the network says of a batch; its logits are on the CPU in float32."""
        device = self.network.device
        outputs = self.network(**{name: given.to(device) for name, given in batch.items()})
        return read_logits(outputs).float().cpu()

    def refuse_bad_weights(self) -> None:
        """Raise LoraError where a number is not finite because a weight is not."""
        try:
            refuse_not_finite(self.network, self.base.name)
        except LoraError as error:
            raise LoraError(error.message, "copy or download its weights again") from None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Without gradients inside, and with DoRA's norms computed once."""
        with torch.inference_mode(), dora_norms.keep_norms(dora_norms.find_layers(self.network)):
            yield


SMALLEST, LARGEST = 2, 2**24
"""Tokens that a tokenizer's limit is between, if it has one: transformers' word for none is a very
large number, and 0 and 1 leave room for no text."""


class Named(NamedTuple):
    """A path that was given, and what it stands for: an adapter on its base, or a whole model."""

    path: str
    adapter: Adapter | None
    base: Base

    @property
    def recipe(self) -> RecordedRecipe:
        """What is recorded of the recipe by which the adapter was trained, or the one in a merged
        model."""
        return self.adapter.recipe if self.adapter else read_merged_recipe(Path(self.path))

    @property
    def columns(self) -> dict[str, str]:
        """The names of columns, as ours: theirs, that training was told of."""
        columns = self.recipe.data.get("columns") or {}
        if not isinstance(columns, dict):
            raise LoraError(f"the record of {self.path} names no columns", "copy the adapter again")
        return {str(ours): str(theirs) for ours, theirs in columns.items()}


def read_all(paths: Sequence[str], base: str | None) -> list[Named]:
    """Read each path: an adapter, on `base` in place of the one that it names, or a whole model.
    Raises LoraError for those of which rows cannot be asked, and for models of several tasks."""
    found = []
    for path in dict.fromkeys(paths):
        adapter = _read(path, base)
        each = Named(path, adapter, adapter.base if adapter else Base.of_model(path))
        _refuse_writer(each)
        found.append(each)
    tasks = {each.base.task.name: each.path for each in found}
    if len(tasks) > 1:
        (one, first), (other, second) = list(tasks.items())[:2]
        raise UsageError(f"{first} is for {one}, and {second} for {other}", "one call for each")
    return found


def open_all(named: Sequence[Named]) -> list[Opened]:
    """Load what was read, a base that several adapters lie on once."""
    shared = SharedBases()
    return [
        _open_adapter(each, each.adapter, shared) if each.adapter else _open_whole(each)
        for each in named
    ]


def _read(path: str, base: str | None) -> Adapter | None:
    """Return the adapter that a path stands for; None for a whole model."""
    kind = names.classify(path)
    if kind == "gguf":
        raise LoraError(
            f"{path} is a GGUF file, and llama.cpp has models that write only",
            f"lora generate {quote(path)} --prompt TEXT",
        )
    return read_adapter(Path(path), base) if kind == "adapter" else None


def _refuse_writer(named: Named) -> None:
    """Raise LoraError for a model that writes text, and for a base on which nothing is trained."""
    task, path = named.base.task, named.path
    if not task.writes_next_tokens:
        return
    kinds = [] if named.adapter else named.base.config.architectures or []
    if kinds and not kinds[0].endswith(task.architectures):
        raise LoraError(
            f"{path} is a base ({kinds[0]}): it has no head that tells anything of a row",
            f"lora train RECIPE --set model.name_or_path={quote(path)}",
        )
    raise LoraError(
        f"{path} is a model that writes text: it has no labels to tell apart",
        f"lora generate {quote(path)} --prompt TEXT",
    )


def _open_adapter(named: Named, adapter: Adapter, shared: SharedBases) -> Opened:
    _refuse_random_head(named.path, adapter)
    network = attach.load_adapter(shared.take(adapter), adapter.folder)
    dora_norms.install(network)
    return _finish(named, network, adapter.load_reader())


def _open_whole(named: Named) -> Opened:
    path, base = named.path, named.base
    if base.lacking:
        raise LoraError(
            f"{path} is a base: its files lack the head ({base.lacking[0]}), which is trained",
            f"lora train RECIPE --set model.name_or_path={quote(path)}",
        )
    return _finish(named, to_accelerator(base.load()), base.load_reader())


def _finish(named: Named, network: PreTrainedModel | PeftModel, reader: Reader) -> Opened:
    """Return a loaded model, ready to be asked."""
    path, base, recipe = named.path, named.base, named.recipe
    if not isinstance(reader, PictureProcessor):
        _settle_padding(path, network, reader)
    found = Opened(path, network.eval(), base, reader, recipe.data, recipe.training.max_length)
    if base.task.counts_labels:
        _refuse_labels(path, found.labels)
        if all(name.startswith(UNNAMED) for name in found.labels):
            ui.say(f"{path} does not name its labels: they are {', '.join(found.labels[:3])}, …")
    return found


def _refuse_labels(path: str, labels: Sequence[str]) -> None:
    """Raise LoraError for labels by which answers cannot be told apart."""
    for number, name in enumerate(labels):
        if not name or labels.index(name) < number:
            fault = f"{name!r}, as {labels.index(name)} is" if name else "nothing"
            raise LoraError(
                f"{path}/config.json: id2label calls label {number} {fault}",
                "give each label a name of its own in a copy of the file",
            )


def _settle_padding(
    path: str, network: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Let short rows be filled at their end, with the token by which the model knows that they
    end."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LoraError(
                f"the tokenizer of {path} has no token that fills short rows",
                "set pad_token in a copy of its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    for config in {id(each): each for each in (network.config, _get_text_config(network))}.values():
        config.pad_token_id = tokenizer.pad_token_id


def _get_text_config(network: PreTrainedModel | PeftModel) -> Any:
    return network.config.get_text_config()


def _refuse_random_head(path: str, adapter: Adapter) -> None:
    """Raise LoraError for an adapter without a part of the head that its base's files lack: PEFT
    saves heads by names, which miss those of some families, and such a part would be random."""
    with safe_open(adapter.folder / "adapter_model.safetensors", framework="pt") as stored:
        there = {key.removeprefix("base_model.model.") for key in stored.keys()}  # noqa: SIM118
    lost = [key for key in adapter.base.lacking if key not in there]
    if lost:
        raise LoraError(
            f"{path} lacks {lost[0]}, and so do the files of its base: it would be random at each "
            "load",
            f"train again, with lora.modules_to_save: [{lost[0].rpartition('.')[0]}, …]",
        )


class Shared(NamedTuple):
    """What adapters must agree in to share the weights of one loaded base."""

    name: str
    revision: str | None
    task: str
    dtype: torch.dtype
    quantization: str


class SharedBases:
    """Bases loaded so far; each at most once."""

    def __init__(self) -> None:
        self.loaded: dict[Shared, PreTrainedModel] = {}

    def take(self, adapter: Adapter) -> PreTrainedModel:
        """Return the base of an adapter, to put it on: modules of its own over shared weights. An
        adapter that changes the base's own weights gets some for itself."""
        if not adapter.shares_base:
            return _load(adapter)
        base = adapter.base
        stored = str(adapter.quantization)
        key = Shared(base.name, base.revision, base.task.name, adapter.trained_dtype, stored)
        if key in self.loaded:
            adapter.refuse_other_base()
        else:
            self.loaded[key] = _load(adapter)
        return make_twin(self.loaded[key], base)


def _load(adapter: Adapter) -> PreTrainedModel:
    base = adapter.load_base()
    return base if adapter.quantization else to_accelerator(base)


def make_twin(network: PreTrainedModel, base: Base) -> PreTrainedModel:
    """Return a model with modules of its own over the weights of `network`, and with the head that
    `base` asks for: its labels, and zeros where their number is another."""
    held = [*network.parameters(), *network.buffers()]
    twin: PreTrainedModel = copy.deepcopy(network, {id(tensor): tensor for tensor in held})
    asked = base.build_empty()
    for path, module in asked.named_modules():
        there = twin.get_submodule(path)
        if type(there) is not type(module):  # in 4 bits, as no head is
            continue
        own = dict(there.named_parameters(recurse=False))
        wanted = dict(module.named_parameters(recurse=False))
        if any(wanted[key].shape != weight.shape for key, weight in own.items()):
            fresh = module.to_empty(device=network.device).to(network.dtype)
            for weight in fresh.parameters():
                torch.nn.init.zeros_(weight)
            twin.set_submodule(path, fresh)
    for field in ("id2label", "label2id", "problem_type"):
        setattr(twin.config, field, getattr(asked.config, field))
    twin.num_labels = asked.config.num_labels
    return twin
