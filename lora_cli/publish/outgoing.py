"""What is uploaded of an artefact: the files of its kind, and no other; those that name places of
this machine as copies that do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.card import Facts, is_public_name, name_file, trim_paths
from lora_cli.common import LoraError, plain_files, provenance, quote, read_json
from lora_cli.gguf import modelfile
from lora_cli.models import ADAPTER_FILES, TOKENIZER_FILES, TRAINED

PATTERNS = {
    "adapter": (*ADAPTER_FILES, "config.json", TRAINED, *TOKENIZER_FILES),
    "merged": (
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
    ),
}
"""What belongs to an artefact, beside its record and its card."""
NAMING = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file")
"""Keys of the libraries' configurations that hold a place of this machine."""


@dataclass(frozen=True)
class Outgoing:
    """A file as it will be on the hub: its name there, and its content or where that lies."""

    name: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        """In bytes."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size

    def digest(self, kind: str) -> str:
        """Return the content's `sha256`, or the name that git gives it (`git`)."""
        total = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)
        if isinstance(self.content, bytes):
            total.update(self.content)
            return total.hexdigest()
        with self.content.open("rb") as file:
            while block := file.read(2**20):
                total.update(block)
        return total.hexdigest()


@dataclass(frozen=True)
class Naming:
    """What a base that was a local folder is called on the hub, and at which commit."""

    base: str | None = None
    commit: str | None = None


def collect_files(
    path: Path, facts: Facts, ggufs: Sequence[Path], naming: Naming
) -> list[Outgoing]:
    """Return the files of an artefact, and of GGUF files beside it, without the card. LoraError
    where two would have one name."""
    found: list[Outgoing] = []
    if facts.kind != "gguf":
        plain_files.refuse_odd_files(path)
        found += _collect_folder(path, facts, naming)
    for file in ggufs if facts.kind != "gguf" else [path, *ggufs]:
        found += _collect_gguf(file, naming)
    unique = {each.name: each for each in found}
    for each in found:
        if unique[each.name].content != each.content:
            raise LoraError(f"two files are called {each.name}", f"mv {quote(each.name)} OTHER")
    return list(unique.values())


def _collect_folder(folder: Path, facts: Facts, naming: Naming) -> Iterator[Outgoing]:
    names = sorted({file for pattern in PATTERNS[facts.kind] for file in folder.glob(pattern)})
    for file in names:
        if file.is_file():
            yield _make_plain(file, naming)
    record = folder / provenance.ARTEFACT_RECORD
    if record.is_file():
        yield Outgoing(record.name, _dump(_trim_record(read_json(record), naming)))


def list_left(folder: Path, sent: Sequence[Outgoing], card: str) -> list[str]:
    """Return the names of what stays here of a folder."""
    names = {each.name for each in sent} | {card}
    return sorted(each.name for each in folder.iterdir() if each.name not in names)


def _collect_gguf(file: Path, naming: Naming) -> Iterator[Outgoing]:
    yield Outgoing(file.name, file)
    record = file.with_name(f"{file.name}.json")
    if record.is_file():
        yield Outgoing(record.name, _dump(_trim_record(read_json(record), naming)))
    ollama = file.with_name("Modelfile")
    if ollama.is_file() and modelfile.is_of(ollama, file):
        yield Outgoing(ollama.name, ollama)


def _make_plain(file: Path, naming: Naming) -> Outgoing:
    """Return a file of a library's, with names in place of paths where it names some."""
    if not file.name.endswith("config.json"):
        return Outgoing(file.name, file)
    data = read_json(file)
    if not isinstance(data, dict):
        return Outgoing(file.name, file)
    changed = data | {
        key: _name_place(data[key], naming)
        for key in NAMING
        if isinstance(data.get(key), str) and data[key]
    }
    if naming.base and "base_model_name_or_path" in data:
        changed |= {"base_model_name_or_path": naming.base, "revision": naming.commit}
    return Outgoing(file.name, file if changed == data else _dump(changed))


def _name_place(text: str, naming: Naming) -> str:
    return text if is_public_name(text) else naming.base or name_file(text)


def _trim_record(record: Any, naming: Naming) -> Any:
    """Return a record without places of this machine, in which a local base has its new name."""
    renamed: dict[str, str] = {}
    if naming.base:
        renamed = {name: naming.base for name in _find_bases(record)}
        _walk_records(record, lambda each: _set_commit(each, naming))
    return trim_paths(record, renamed)


def _walk_records(record: Any, change: Callable[[dict[str, Any]], None]) -> None:
    while isinstance(record, dict):
        change(record)
        record = record.get("parent")


def _find_bases(record: Any) -> set[str]:
    """Return what a record, and those in it, call the base."""
    found: set[str] = set()

    def note(each: dict[str, Any]) -> None:
        base, recipe = each.get("base"), each.get("recipe")
        model = recipe.get("model") if isinstance(recipe, dict) else None
        names = [base.get("name") if isinstance(base, dict) else base]
        names += [model.get("name_or_path")] if isinstance(model, dict) else []
        found.update(name for name in names if isinstance(name, str))

    _walk_records(record, note)
    return found


def _set_commit(record: dict[str, Any], naming: Naming) -> None:
    if isinstance(record.get("base"), dict):
        record["base"]["commit"] = naming.commit
    elif isinstance(record.get("base"), str):
        record["revision"] = naming.commit


def _dump(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
