"""The models that `lora evaluate` scores: what each path stands for, the base beside adapters, and
what tells one from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lora_cli.common import UsageError, devices, provenance, quote, ui
from lora_cli.evaluate import loaded_bases, open_answerers
from lora_cli.evaluate.answerers import Answerer
from lora_cli.evaluate.gguf_answerer import GGUFAnswerer
from lora_cli.evaluate.hf_answerers import HFAnswerer
from lora_cli.models import (
    Adapter,
    Base,
    RecordedRecipe,
    chat_template,
    names,
    read_adapter,
    read_merged_recipe,
)
from lora_cli.recipe import DEFAULT_OBJECTIVE, Objective, Task, name_objective

SHORT = 24
"""Characters of a path that stands whole over a column."""
Kind = Literal["base", "adapter", "merged", "gguf"]


@dataclass(frozen=True)
class Scored:
    """A model that is scored."""

    label: str
    """As it is shown."""
    kind: Kind
    path: str
    adapter: Adapter | None = None
    """Of a base, the first adapter on it, whose template and tokens it is given."""
    base: Base | None = None
    """None of a GGUF file."""

    @cached_property
    def recipe(self) -> RecordedRecipe:
        """The recipe that it was trained by, as far as that is known."""
        if self.adapter is not None:
            return self.adapter.recipe
        return read_merged_recipe(Path(self.path)) if self.kind == "merged" else RecordedRecipe()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What reads for it; not of a GGUF file, which has its own."""
        assert self.base is not None, "a GGUF file reads by itself"
        return self.adapter.load_tokenizer() if self.adapter else self.base.load_tokenizer()

    @cached_property
    def identity(self) -> str:
        """A hash of all by which it answers: weights, template and tokens, the settings by which it
        writes, the kind of device."""
        said: dict[str, Any] = {"device": devices.find_device().type}
        if self.base is None:
            said["file"] = _hash_file(Path(self.path))
        else:
            said |= {"base": self.base.fingerprint, "reader": hash_reader(self.tokenizer)}
            said["settings"] = self.base.generation_settings
        if self.adapter is not None:
            said["stops"] = self.adapter.stop_token_ids
            said["type"] = str(self.adapter.trained_dtype)
            said["quantization"] = str(self.adapter.quantization)
        if self.adapter is not None and self.kind == "adapter":
            weights = ("adapter_model.safetensors", "adapter_config.json")
            said["adapter"] = [_hash_file(self.adapter.folder / name) for name in weights]
        return make_key(said)


def make_key(said: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_reader(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of how a tokenizer splits and renders."""
    template = chat_template.find_template(tokenizer)
    return make_key([tokenizer.backend_tokenizer.to_str(), template, tokenizer.special_tokens_map])


def list_scored(
    paths: Sequence[str], base: str | None, adds_base: bool, data: str | None
) -> list[Scored]:
    """Return what each path stands for; where there are adapters, first the base of each, unless it
    is among them. Raises LoraError for models that do not write."""
    found = [_read(path, base, data) for path in dict.fromkeys(paths)]
    bases: dict[str, Scored] = {}
    for each in found:
        if each.kind == "adapter" and each.adapter is not None:
            name = each.adapter.base.name
            bases.setdefault(name, Scored(name, "base", name, each.adapter, each.adapter.base))
    # a base that was named is read as the adapters on it read
    found = [bases.pop(each.label, each) for each in found]
    return _shorten_labels([*(bases.values() if adds_base else ()), *found])


def _shorten_labels(scored: Sequence[Scored]) -> list[Scored]:
    """Return models under short names: a base of adapters is `base` where there is one, and a long
    path is the last parts of it that no other has."""
    bases = [each for each in scored if each.kind == "base" and each.adapter]
    made = []
    for each in scored:
        others = [other.path for other in scored if other is not each]
        label = "base" if bases == [each] and "base" not in others else _shorten(each.path, others)
        made.append(replace(each, label=label))
    return made


def _shorten(path: str, others: Sequence[str]) -> str:
    """Return the last parts of a path, as many as tell it from the others; a short one whole."""
    if len(path) <= SHORT:
        return path
    parts = Path(path).parts
    for number in range(1, len(parts)):
        tail = str(Path(*parts[-number:]))
        if not any(f"/{other}".endswith(f"/{tail}") for other in others):
            return tail
    return path


def _read(path: str, base: str | None, data: str | None) -> Scored:
    kind = names.classify(path)
    if kind == "gguf":
        return Scored(path, "gguf", path)
    if kind == "adapter":
        adapter = read_adapter(Path(path), base)
        _refuse_other_task(path, adapter.base.task, data)
        return Scored(path, "adapter", path, adapter, adapter.base)
    model = Base.of_model(path)
    _refuse_other_task(path, model.task, data)
    merged = (Path(path) / provenance.ARTEFACT_RECORD).is_file()
    return Scored(path, "merged" if merged else "base", path, None, model)


def _refuse_other_task(path: str, task: Task, data: str | None) -> None:
    """Raise UsageError for a model that does something else than writing on; `lora predict` has the
    metrics of those."""
    if not task.writes_next_tokens:
        raise UsageError(
            f"{path} is for models that {task.does}: lora predict has their metrics",
            f"lora predict {quote(path)} --data {quote(data or 'FILE')}",
        )


def find_reader(scored: Sequence[Scored]) -> Scored | None:
    """Return the first model that Hugging Face's tokenizer reads for: those that were trained come
    before bases alone."""
    own = [each for each in scored if each.base is not None]
    trained = [each for each in own if each.adapter is not None or each.kind == "merged"]
    return next(iter([*trained, *own]), None)


def find_columns(scored: Sequence[Scored]) -> dict[str, str]:
    """Return the names of columns, as ours: theirs, that a training was told of."""
    for each in scored:
        columns = each.recipe.data.get("columns")
        if isinstance(columns, dict) and columns:
            return {str(ours): str(theirs) for ours, theirs in columns.items()}
    return {}


def find_objective(scored: Sequence[Scored]) -> Objective:
    """Return the objective of the first model that was trained to tell better answers from others,
    else that of single ones."""
    found = (name_objective(each.recipe.objective) for each in scored)
    return next((each for each in found if each.compares), DEFAULT_OBJECTIVE)


class Shelf:
    """Models that are open: adapters and their base as long as the evaluation goes on, since they
    share weights, any other until the next one is opened."""

    def __init__(self) -> None:
        self.bases = loaded_bases.Bases()
        self.opened: dict[str, Answerer] = {}
        self.alone: tuple[str, Answerer] | None = None

    def open(self, scored: Scored) -> Answerer:
        """Return what answers for a model."""
        if scored.adapter is None:
            return self._open_alone(scored)
        if scored.label not in self.opened:
            number = len(self.opened)
            self.opened[scored.label] = (
                self._open_base(scored.adapter)
                if scored.kind == "base"
                else open_answerers.open_adapter(scored.adapter, self.bases, number)
            )
        return self.opened[scored.label]

    def _open_alone(self, scored: Scored) -> Answerer:
        if self.alone is not None and self.alone[0] == scored.label:
            return self.alone[1]
        self.close()
        if scored.kind == "gguf":
            opened: Answerer = GGUFAnswerer(Path(scored.path))
        else:
            opened = open_answerers.open_models([scored.path])[scored.path]
        self.alone = (scored.label, opened)
        return opened

    def close(self) -> None:
        """Let a model that shares nothing go."""
        if self.alone is not None and isinstance(self.alone[1], GGUFAnswerer):
            self.alone[1].model.close()
        self.alone = None

    def _open_base(self, adapter: Adapter) -> HFAnswerer:
        """Open a base as its adapter reads: by its template and tokens, unless these are more than
        the base has."""
        key, tokenizer = self.bases.bare(adapter), adapter.load_tokenizer()
        opened = HFAnswerer(self.bases, key, None, tokenizer, adapter.stop_token_ids)
        rows = opened.network.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            ui.say(
                f"{adapter.base} has {rows} tokens, and {adapter} adds some: it reads by its own"
            )
            opened.tokenizer = adapter.base.load_tokenizer()
        return opened
