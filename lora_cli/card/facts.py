"""What a folder or a GGUF file says of itself: the records from which its card is made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from lora_cli.card.portable import is_public_name, name_file, trim_paths
from lora_cli.common import (
    LoraError,
    files,
    library_errors,
    plain_files,
    provenance,
    ui,
)
from lora_cli.models import MadeRecord, TrainingRecord, adapter_contents, names
from lora_cli.recipe import DEFAULT_TASK, Task, find_task, recognise_task

LICENSE = ("license", "license_name", "license_link")
CARD = "README.md"


@dataclass(frozen=True)
class ExportedFile:
    """A GGUF file beside the model: its type, and how it was compared with what it was made
    from."""

    name: str
    size: int
    type: str = ""
    checked: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of an artefact; every text in `training` and `made` may be shown."""

    kind: str
    """`adapter`, `merged` or `gguf`."""
    title: str
    task: Task
    base: str | None
    """The base's name; only the folder's where it lay on the trainer's machine."""
    base_commit: str | None = None
    is_on_hub: bool = False
    """Whether the base is a name on the hub."""
    training: dict[str, Any] = field(default_factory=dict)
    """The record of the adapter's training, trimmed; empty where there is none."""
    made: dict[str, Any] = field(default_factory=dict)
    """The record of the merge, trimmed."""
    ggufs: tuple[ExportedFile, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json, of an adapter."""
    beyond: tuple[str, ...] = ()
    """What an adapter holds beside updates of linear weights."""
    has_template: bool = False
    license: dict[str, str] = field(default_factory=dict)
    evaluations: tuple[dict[str, Any], ...] = ()
    place: str = "."
    """What a program calls it by: its name on the hub, or its folder."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, trimmed."""
        return dict(self.training.get("recipe") or {})

    @property
    def source(self) -> dict[str, str]:
        """The GGUF file that a base was dequantised from: its name as `file`, `type`, `dtype` and
        `sha256`; empty for any other base, also one that is on the hub."""
        found = self.part("base").get("made_from")
        if self.is_on_hub or not isinstance(found, dict):
            return {}
        return {**found, "file": name_file(str(found.get("file") or "base.gguf"))}

    def part(self, name: str) -> dict[str, Any]:
        """Return a section of the training's record; empty where it is none."""
        found = self.training.get(name)
        return found if isinstance(found, dict) else {}


def read_facts(
    path: Path, base_name: str | None = None, commit: str | None = None, title: str | None = None
) -> Facts:
    """Return what an adapter's folder, a merged model's or a GGUF file says of itself.

    `base_name`, at `commit`, is what a base that was a local folder is called on the hub; `title`
    is what it is called, if not by its folder. Raise LoraError where it is no such thing.
    """
    facts = _read(path, base_name, commit)
    return replace(facts, title=title) if title else facts


def _read(path: Path, base_name: str | None, commit: str | None) -> Facts:
    if path.is_file() and plain_files.is_gguf(path):
        return read_gguf_facts(path, base_name, commit)
    kind = names.classify(str(path)) if path.exists() else ""
    if kind == "adapter":
        return _read_adapter(path, base_name, commit)
    if kind == "model":
        return _read_merged(path, base_name, commit)
    raise LoraError(
        f"{path} is no adapter, merged model or GGUF file", "give a folder or file that lora made"
    )


def _read_adapter(folder: Path, base_name: str | None, commit: str | None) -> Facts:
    config = files.read_mapping(folder / "adapter_config.json")
    file = folder / provenance.ARTEFACT_RECORD
    training = TrainingRecord.read(file).to_data() if file.is_file() else {}
    named = str((training.get("base") or config).get(_base_key(training)) or "")
    given = commit or (training.get("base") or config).get("commit" if training else "revision")
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    facts = Facts(
        "adapter",
        files.name_artefact(folder),
        find_task(config.get("task_type"), str(kind)) or DEFAULT_TASK,
        None,
        training=trim_paths(training, _rename(named, base_name)),
        config=trim_paths(config, _rename(named, base_name)),
        beyond=tuple(adapter_contents.list_beyond(folder)),
        has_template=_has_template(folder),
    )
    return _with_base(facts, named, base_name, given if isinstance(given, str) else None)


def _base_key(training: dict[str, Any]) -> str:
    return "name" if training else "base_model_name_or_path"


def _read_merged(folder: Path, base_name: str | None, commit: str | None) -> Facts:
    file = folder / provenance.ARTEFACT_RECORD
    made = MadeRecord.read(file).to_data() if file.is_file() else {}
    config = files.read_mapping(folder / "config.json")
    shapes = config.get("architectures")
    task = recognise_task(shapes if isinstance(shapes, list) else None)
    facts = Facts(
        "merged", files.name_artefact(folder), task, None, has_template=_has_template(folder)
    )
    return _with_made(facts, made, base_name, commit)


def read_gguf_facts(file: Path, base_name: str | None = None, commit: str | None = None) -> Facts:
    """Return what a GGUF file's record says of it and of the model it was made from."""
    record = _read_exported(file)
    made = record.get("parent")
    facts = Facts("gguf", file.stem, DEFAULT_TASK, None, ggufs=(read_export(file),))
    return _with_made(facts, made if isinstance(made, dict) else {}, base_name, commit)


def read_export(file: Path) -> ExportedFile:
    """Return what the record beside a GGUF file says of it."""
    record = _read_exported(file)
    checked = trim_paths(str(record.get("checked") or ""))
    size = file.stat().st_size
    return ExportedFile(file.name, size, str(record.get("type") or ""), checked)


def _read_exported(file: Path) -> dict[str, Any]:
    record = file.with_name(f"{file.name}.json")
    return MadeRecord.read(record).to_data() if record.is_file() else {}


def _with_made(
    facts: Facts, made: dict[str, Any], base_name: str | None, commit: str | None
) -> Facts:
    """Return facts with those of a merged model's record, and of the adapter in it."""
    training = made.get("parent")
    named, given = str(made.get("base") or ""), made.get("revision")
    renamed = _rename(named, base_name)
    known = replace(
        facts,
        training=trim_paths(training, renamed) if isinstance(training, dict) else {},
        made=trim_paths({k: v for k, v in made.items() if k != "parent"}, renamed),
    )
    return _with_base(
        known, named, base_name, commit or (given if isinstance(given, str) else None)
    )


def _rename(named: str, base_name: str | None) -> dict[str, str]:
    return {named: base_name} if base_name and named else {}


def _with_base(facts: Facts, named: str, base_name: str | None, commit: str | None) -> Facts:
    """Return facts that name the base, by what anybody may be told, and its license."""
    shown = base_name or named
    on_hub = bool(shown) and is_public_name(shown) and (commit is not None or not facts.training)
    return replace(
        facts,
        base=(shown if on_hub else name_file(shown)) if shown else None,
        base_commit=commit if on_hub else None,
        is_on_hub=on_hub,
        license=read_license(named, commit),
    )


def _has_template(folder: Path) -> bool:
    """Return whether the tokenizer in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(files.read_mapping(file).get("chat_template"))


def read_license(base: str, commit: str | None) -> dict[str, str]:
    """Return the license that the card of a base names, of a folder or in the hub's cache; empty
    where no card is here, and, which is said, where it cannot be read."""
    folder = Path(base or ".").expanduser()
    file: Any = folder / CARD
    if base and not folder.is_dir() and names.is_hub_name(base):
        file = try_to_load_from_cache(base, CARD, revision=commit)
    if not base or not isinstance(file, (str, Path)) or not Path(file).is_file():
        return {}
    try:
        return parse_license(plain_files.read_small(Path(file)), str(file))
    except LoraError as error:  # of no adapter that took hours
        ui.warn(f"the license of {base} is not known: {error.message}")
        return {}


def parse_license(text: str, source: str) -> dict[str, str]:
    """Return the license that a card names; LoraError where its metadata is none."""
    with library_errors.translate_file_errors(f"{source} is no model's card", f"mend {CARD}"):
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {key: str(data[key]) for key in LICENSE if isinstance(data.get(key), str)}
