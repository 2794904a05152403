"""`lora push`: an adapter, a merged model or GGUF files become a repository on the hub.

Read and checked -> named as on the hub -> card -> looked through for what is private -> listed ->
asked -> one commit -> compared with what is there.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_cli.card import CARD, Facts, is_edited, make_card, read_facts
from lora_cli.common import (
    LoraError,
    UsageError,
    plain_files,
    privacy,
    quote,
    read_json,
    spell_count,
    ui,
)
from lora_cli.gguf import header
from lora_cli.models import Base, hub, read_adapter
from lora_cli.publish import outgoing, private, remote
from lora_cli.publish.outgoing import Naming, Outgoing
from lora_cli.publish.remote import Repository
from lora_cli.publish.show import add_evaluations, add_files


class Wishes(NamedTuple):
    """The options of a push."""

    private: bool = False
    ggufs: tuple[Path, ...] = ()
    base_name: str | None = None
    branch: str = "main"
    yes: bool = False
    dry_run: bool = False


def push(path: Path, name: str, wishes: Wishes) -> str | None:
    """Upload the artefact at `path` to the repository `name`; return the address of the commit,
    None where nothing was to be sent.

    Raise LoraError for an artefact that cannot be used, files with something private in them, and
    what the hub refuses; UsageError for what would have to be asked where nobody can answer.
    """
    remote.refuse_name(name)
    if not (wishes.yes or wishes.dry_run or sys.stdin.isatty()):
        raise UsageError("nobody is there to be asked", "--yes uploads, --dry-run lists")
    naming = _find_naming(wishes.base_name)
    facts = _read_checked(path, name, naming, wishes)
    there = _look(name, wishes)
    sent = outgoing.collect_files(path, facts, wishes.ggufs, naming)
    card = _make_card(path, _add_license(facts, wishes), there)
    sent += [card] if card else []
    private.refuse_private(sent, private.find_places([path, path.parent]))
    _list(path, sent, there, wishes)
    if wishes.dry_run or not (wishes.yes or _ask()):
        ui.say("nothing was uploaded")
        return None
    commit = remote.upload(there, sent, wishes.private, f"lora push: {facts.kind}")
    remote.compare(there, commit, sent)
    files = spell_count(len(sent), "file is", "files are")
    ui.say(f"  {len(sent)} of {files} there as here")
    return f"{remote.find_address()}/{name}/commit/{commit}"


def _read_checked(path: Path, name: str, naming: Naming, wishes: Wishes) -> Facts:
    """Return what the artefact says of itself, once it has been opened."""
    facts = read_facts(path, naming.base, naming.commit, name.partition("/")[2])
    facts = replace(add_files(add_evaluations(facts, path), wishes.ggufs), place=name)
    _refuse_local_base(path, facts)
    _check_artefact(path, facts, wishes.ggufs, naming)
    return facts


def _add_license(facts: Facts, wishes: Wishes) -> Facts:
    """Return facts with the license of a base on the hub, unless that may not be asked."""
    if wishes.dry_run or facts.license or not (facts.is_on_hub and facts.base):
        return facts
    return replace(facts, license=remote.find_license(facts.base, facts.base_commit))


def _find_naming(base_name: str | None) -> Naming:
    if base_name is None:
        return Naming()
    remote.refuse_name(base_name)
    return Naming(base_name, hub.resolve_commit(base_name, None))


def _refuse_local_base(path: Path, facts: Facts) -> None:
    """Raise LoraError for an adapter that nobody could load: its base is a folder of this
    machine."""
    if facts.is_on_hub:
        return
    if facts.kind == "adapter":
        raise LoraError(
            f"the base of {path}, {facts.base}, is a folder of this machine: nobody else could load"
            " the adapter",
            "--base-name OWNER/NAME, what the base is called on the hub",
        )
    ui.warn("the base is a folder of this machine, or is not known: the card links to none")


def _check_artefact(path: Path, facts: Facts, ggufs: Sequence[Path], naming: Naming) -> None:
    """Raise LoraError where what is to be uploaded cannot be opened: weights cut off, no
    tokenizer."""
    if facts.kind == "adapter":
        if naming.base:
            _compare_base(path, naming)
        read_adapter(path, naming.base).load_reader()
    elif facts.kind == "merged":
        model = Base.of_model(str(path))
        if model.tensors is None:
            raise LoraError(f"{path} has no safetensors", "lora merge ADAPTER OUT")
        model.load_reader()
    for file in ggufs if facts.kind != "gguf" else [path, *ggufs]:
        _check_gguf(file)


def _compare_base(path: Path, naming: Naming) -> None:
    """Warn where the base in a folder is not, file by file, what it is to be called on the hub."""
    assert naming.base is not None, "_check_artefact has looked"
    named = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    folder = Path(privacy.expand_home(named)) if isinstance(named, str) and named else None
    if folder is None or not folder.is_dir():
        return
    if not remote.has_weights(naming.base, naming.commit, folder):
        ui.warn(f"{naming.base} does not have the same files of weights as {folder}")


def _check_gguf(file: Path) -> None:
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view,
        memoryview(view) as bytes_,
    ):
        header.read_header(bytes_)


def _look(name: str, wishes: Wishes) -> Repository:
    """Return the repository as it is; of a dry run, which asks the hub nothing, one that is not
    there."""
    if wishes.dry_run:
        return Repository(name, wishes.branch, is_private=wishes.private)
    account = remote.find_account()
    there = remote.look(name, wishes.branch)
    ui.say(f"as {account}")
    if there.exists and wishes.private and not there.is_private:
        raise LoraError(
            f"{name} is there already, and public",
            "make it private in its settings, or give another name",
        )
    return there


def _make_card(path: Path, facts: Facts, there: Repository) -> Outgoing | None:
    """Return the card to upload, with what a person wrote here or there; None where the one on the
    hub is to stay."""
    folder = path.parent if facts.kind == "gguf" else path
    here = folder / CARD
    local = plain_files.read_small(here) if facts.kind != "gguf" and here.is_file() else ""
    edited_there = is_edited(there.card)
    if edited_there and is_edited(local) and local != there.card:
        ui.warn(f"{CARD} was written by hand here and on the hub: the one on the hub stays")
        return None
    made = make_card(facts, there.card if edited_there else local)
    if made.kept:
        ui.say(f"  {CARD}: {made.kept}")
    return Outgoing(CARD, made.text.encode())


def _list(path: Path, sent: Sequence[Outgoing], there: Repository, wishes: Wishes) -> None:
    """Say what will be uploaded, and where."""
    is_private = there.is_private if there.exists else wishes.private
    kind = "private" if is_private else "public"
    state = "is there" if there.exists else "the hub was not asked" if wishes.dry_run else "new"
    ui.say(f"{path} -> {there.name} ({kind}, {state}), branch {there.branch}")
    rows = [[each.name, _format_size(each.size)] for each in sorted(sent, key=lambda e: e.name)]
    ui.say(*(f"  {line}" for line in ui.format_table(["file", "size"], rows)))
    ui.say(f"  {spell_count(len(sent), 'file')}, {_format_size(sum(each.size for each in sent))}")
    if path.is_dir() and (left := outgoing.list_left(path, sent, CARD)):
        ui.say(f"  not uploaded: {', '.join(map(quote, left))}")


def _format_size(size: int) -> str:
    return f"{size:,} B" if size < 2**20 else f"{size / 2**20:,.1f} MiB"


def _ask() -> bool:
    ui.ask("upload? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
