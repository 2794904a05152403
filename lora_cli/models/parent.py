"""Train an adapter on: read the one that `model.adapter` names, and take over what it decides.

A run keeps a copy of it, so that the run goes on as the same one whatever becomes of the original.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from lora_cli.common import LoraError, files, join_errors, provenance, show_as, spell_count
from lora_cli.models import adapter_config, adapter_contents, attach, peft_matching
from lora_cli.models.adapter_folder import ADAPTER_FILES, TOKENIZER_FILES, Adapter, read_adapter
from lora_cli.models.base import Base
from lora_cli.models.head import CONFIG
from lora_cli.models.tensors import Tensors
from lora_cli.recipe import Lora, Recipe, list_contradictions, upstream

PARENT_COPY = ".parent"
"""Where a run keeps the adapter it trains on."""
FREE = ("lora_dropout", "autocast_adapter_dtype", "init_lora_weights", "use_dora")
"""Keys of `lora:` that may differ from the adapter's, or that are compared elsewhere."""
Problem = tuple[str, str | None]


@dataclass(frozen=True)
class Parent:
    """The adapter that a run trains on."""

    adapter: Adapter
    name: str
    """As the recipe names it."""
    sha256: str
    """Of the file of its weights."""
    notes: tuple[str, ...]
    """What of it a run does not take as it was, in words."""

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        """Where it is read from, with PEFT's names of tensors."""
        return self.adapter.folder

    def describe(self) -> str:
        """Return it in words: `runs/a/adapter (DoRA r 4 on 210 modules, run f1fe4acb)`."""
        config = files.read_json(self.folder / "adapter_config.json")
        ranks = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
        least, most = min(ranks), max(ranks)
        entries = Tensors([self.folder / ADAPTER_FILES[1]]).entries
        halves = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")
        modules = sum(bool(halves.search(key)) for key in entries)
        rank = f"r {most}" if least == most else f"r {least} to {most}"
        kind = "DoRA" if config.get("use_dora") else "LoRA"
        beyond = adapter_contents.list_beyond(self.folder)
        more = [each for each in beyond if each != adapter_contents.DORA]
        run = [f"run {self.run_id[:8]}"] if self.run_id else []
        listed = ", ".join([f"{kind} {rank} on {spell_count(modules, 'module')}", *more, *run])
        return f"{self.name} ({listed})"

    @property
    def run_id(self) -> str | None:
        """The run that made it, where it has a record of one."""
        return self.adapter.record.id if self.adapter.record else None

    def to_record(self) -> dict[str, Any]:
        """Return what the record of a run keeps of it, with what it was itself trained on from."""
        record = self.adapter.record
        config = files.read_json(self.folder / "adapter_config.json")
        name = record.base.name if record else None
        commit = record.base.commit if record else None
        return {
            "name": self.name,
            "sha256": self.sha256,
            "base": {
                "name": name or config.get("base_model_name_or_path"),
                "commit": commit or config.get("revision"),
            },
            "id": self.run_id,
            "parent": record.parent.to_data() if record and record.parent else None,
        }

    def refuse_other_base(self, base: Base) -> None:
        """Raise LoraError where `base` is not the one that it was trained on, as far as its record
        tells."""
        with translate_hints("model.name_or_path"):
            replace(self.adapter, base=base).refuse_other_base()

    def refuse_unfit(self, model: PeftModel) -> None:
        """Raise LoraError unless `model`, whose adapter is as the recipe says, has its tensors."""
        with translate_hints("model.adapter"):
            attach.refuse_unfit(model, self.folder)

    def put_on(self, model: PreTrainedModel, config: LoraConfig, autocast: bool) -> PeftModel:
        """Put it on a base, in place, to be trained on. Raises LoraError where it does not fit."""
        with translate_hints("model.adapter"):
            return attach.load_adapter(
                model,
                self.folder,
                is_trainable=True,
                config=config,
                autocast_adapter_dtype=autocast,
            )

    def keep(self, run: Path) -> None:
        """Copy it into the folder of the run that trains on it, unless it is there."""
        if (run / PARENT_COPY).is_dir():
            return
        source = self.adapter.given or self.folder
        wanted = (*ADAPTER_FILES, CONFIG, *TOKENIZER_FILES)
        with files.staged_folder(run / PARENT_COPY) as staging:
            for path in source.iterdir():
                if path.is_file() and any(fnmatch(path.name, pattern) for pattern in wanted):
                    shutil.copyfile(path, staging / path.name)
            if self.adapter.record:  # of a checkpoint, it lies in another folder
                record = self.adapter.record.to_data()
                files.write_json(staging / provenance.ARTEFACT_RECORD, record)


@contextmanager
def translate_hints(key: str) -> Iterator[None]:
    """Let errors inside begin with the recipe's `key`, and name its keys where they name options of
    the command line."""
    try:
        yield
    except LoraError as error:
        if error.message.startswith("model."):
            raise
        made = error.with_message(f"{key}: {error.message}")
        hint = re.sub(r"--base (?=[A-Z/~.'$])", "--set model.name_or_path=", error.hint or "")
        made.hint = hint.replace("--base", "model.name_or_path") or None
        raise made from error


def take_over(recipe: Recipe, run: Path | None = None) -> tuple[Recipe, Parent | None]:
    """Return the recipe with what the adapter that it trains on decides, and that adapter; the same
    recipe and None where it makes a new one.

    `run` is the folder of a run that is resumed: its own copy of the adapter is taken. Raises
    LoraError for an adapter that cannot be trained on, UsageError where the recipe contradicts it.
    """
    name = recipe.model.adapter
    if name is None:
        return recipe, None
    notes: list[str] = []
    with translate_hints("model.adapter"):
        folder = _choose_folder(name, run, notes)
        adapter, config = _read(recipe, folder, name)
    problems = list(_find_contradictions(recipe, adapter, config, name))
    if problems:
        raise join_errors(f"with the adapter {name}", problems)
    taken = _replace_lora(recipe, adapter.base, config)
    if problems := list(list_contradictions(taken)):
        raise join_errors(f"with the adapter {name}", problems)
    notes += _note_differences(taken, adapter, config)
    weights = (adapter.given or adapter.folder) / ADAPTER_FILES[1]
    return taken, Parent(adapter, name, _hash(weights), tuple(notes))


def _choose_folder(name: str, run: Path | None, notes: list[str]) -> Path:
    """Return where to read the adapter: a run's copy, where it has one and the original is not
    another one by now."""
    given = Path(name)
    kept = run / PARENT_COPY if run else None
    if kept is None or not kept.is_dir():
        return given
    show_as(kept, given)
    weights = given / ADAPTER_FILES[1]
    if not given.exists():
        notes.append(f"{name} is not here any more: the run's own copy is taken")
    elif weights.is_file() and _hash(weights) != _hash(kept / ADAPTER_FILES[1]):
        raise LoraError(
            f"{name} is not the adapter any more that the run in {run} began with",
            "put that back, or --set output_dir=… starts another run",
        )
    return kept


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(recipe: Recipe, folder: Path, name: str) -> tuple[Adapter, dict[str, Any]]:
    """Return the adapter with its base, the recipe's where it names one, and its configuration."""
    given = recipe.model.name_or_path
    adapter = read_adapter(folder, None if given == "auto" else given)
    config = files.read_json(adapter.folder / "adapter_config.json")
    adapter_config.refuse_untrainable(name, config)
    base = adapter.base
    if base.revision is None and base.name == config.get("base_model_name_or_path"):
        base = read_adapter(folder).base
    revision = recipe.model.revision or base.revision
    return replace(adapter, base=replace(base, revision=revision)), config


def _find_contradictions(
    recipe: Recipe, adapter: Adapter, config: Mapping[str, Any], name: str
) -> Iterator[Problem]:
    """Find what the recipe writes and the adapter has otherwise."""
    yield from _find_other_task(recipe, adapter, name)
    dora = bool(config.get("use_dora"))
    if recipe.find_place("method") and dora != (recipe.method in ("dora", "qdora")):
        fitting = {"lora": "dora", "qlora": "qdora", "dora": "lora", "qdora": "qlora"}
        kind = "DoRA" if dora else "LoRA without DoRA"
        yield (
            f"{recipe.where('method')} is {recipe.method}, but the adapter {name} is {kind}",
            f"method: {fitting[recipe.method]}",
        )
    if recipe.lora.use_dora not in (None, dora):
        where = recipe.where("lora", "use_dora")
        yield (
            f"{where} is {recipe.lora.use_dora}, but the adapter {name} has {dora}",
            "leave it out",
        )
    taken = _read_lora(config)
    for key in sorted(recipe.lora.model_fields_set - {*FREE}):
        given, there = getattr(recipe.lora, key), getattr(taken, key)
        if _spell(given) == _spell(there) or _targets_alike(recipe, adapter, taken, key):
            continue
        yield (
            f"{recipe.where('lora', key)} is {given}, but the adapter {name} has {there}",
            "leave it out",
        )


def _find_other_task(recipe: Recipe, adapter: Adapter, name: str) -> Iterator[Problem]:
    """Find a task, or labels, that are not the adapter's."""
    if adapter.base.task is not recipe.task_row:
        yield (
            f"{recipe.where('task')} is {recipe.task}, but the adapter {name} is of models that "
            f"{adapter.base.task.does}",
            f"task: {adapter.base.task.name}",
        )
    settings = adapter.base.head_settings
    labels = recipe.model.labels
    if settings and labels not in ("auto", [*settings.labels]):
        yield (
            f"{recipe.where('model', 'labels')} are {', '.join(labels)}, but the adapter {name} "
            f"has {', '.join(settings.labels)}",
            "leave them out",
        )


def _read_lora(config: Mapping[str, Any]) -> Lora:
    return Lora.model_validate(adapter_config.read_lora_fields(config))


def _spell(value: Any) -> Any:
    """Return a value of `lora:` such that two which mean the same are equal: names have no order,
    and nothing is nothing."""
    if isinstance(value, list):
        return frozenset(map(str, value)) or None
    return None if value in ({}, "") else value


def _targets_alike(recipe: Recipe, adapter: Adapter, taken: Lora, key: str) -> bool:
    """Return whether the recipe's value of a key that chooses modules chooses those of the adapter:
    PEFT saves `all-linear` as the names that it found."""
    if key not in ("target_modules", "exclude_modules", "target_parameters"):
        return False
    network = adapter.base.build_empty()

    def choose(lora: Lora) -> tuple[list[str], list[str]]:
        made = upstream.build_lora_config(recipe.model_copy(update={"lora": lora}))
        resolved = peft_matching.resolve_targets(network, made)
        names = [name for name, _ in network.named_modules()]
        return (
            peft_matching.find_targeted_modules(resolved, names),
            peft_matching.find_targeted_parameters(resolved, network),
        )

    return choose(taken) == choose(taken.model_copy(update={key: getattr(recipe.lora, key)}))


def _replace_lora(recipe: Recipe, base: Base, config: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the adapter's base, method and `lora`; what may differ is the
    recipe's where it writes it."""
    written = {
        key: getattr(recipe.lora, key)
        for key in ("lora_dropout", "autocast_adapter_dtype")
        if key in recipe.lora.model_fields_set
    }
    lora = Lora.model_validate(adapter_config.read_lora_fields(config) | written)
    method = ("q" if recipe.quantized else "") + ("dora" if config.get("use_dora") else "lora")
    named: dict[str, Any] = {"name_or_path": base.name, "revision": base.revision}
    if settings := base.head_settings:
        named["labels"] = [*settings.labels] or "auto"
        named["problem_type"] = settings.problem_type or "auto"
    model = recipe.model.model_copy(update=named)
    return recipe.model_copy(update={"lora": lora, "method": method, "model": model})


def _note_differences(recipe: Recipe, adapter: Adapter, config: Mapping[str, Any]) -> Iterator[str]:
    """Say what the run does otherwise than the adapter's own training did."""
    before, now = config.get("lora_dropout", 0.0), recipe.lora.lora_dropout
    if before != now:
        yield f"lora.lora_dropout = {now} (the adapter was trained with {before})"
    if adapter.record is None:
        return
    prefix, own = adapter.recipe.source_prefix, recipe.data.source_prefix or ""
    if recipe.task_row.has_targets and prefix != own:
        yield f"data.source_prefix = {own!r} (the adapter was trained with {prefix!r})"
    stored = adapter.quantization
    if bool(stored) != recipe.quantized:
        fitting = {"lora": "qlora", "dora": "qdora", "qlora": "lora", "qdora": "dora"}
        kind = "4-bit weights" if stored else "weights that were not quantised"
        yield (
            f"the adapter was trained on {kind}: {recipe.method} starts from another function than "
            f"it left (method: {fitting[recipe.method]} from the same)"
        )
