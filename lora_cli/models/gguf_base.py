"""Make a GGUF file a base to train on: dequantised once, into a folder of lora's cache.

The folder is called by the file's sha256, so that a file is found again under another name. What
was written is read again and held against the file: the numbers of every tensor, and, where
xllamacpp is installed, how llama.cpp splits texts into tokens and what it expects after them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from functools import cache
from pathlib import Path

from lora_cli.common import LoraError, files, library_errors, lock, plain_files, privacy, quote, ui
from lora_cli.models import gguf_in_llama, gguf_kept, gguf_reading
from lora_cli.models.record import GGUFSource

BESIDE = 64
"""Bytes that a token's text, its merges and its place in lists take in the tokenizer's files, for
each item of the file's arrays."""


def dequantise(path: Path) -> Path:
    """Return the folder with the model of a GGUF file, which is made where it is not there yet.

    Raises LoraError for a file that transformers does not read, RejectedError where what it reads
    is not the model in the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LoraError(
            f"{path} as a base needs the package gguf, which is not installed",
            "pip install 'lora-cli[gguf]'",
        )
    state = path.stat()
    return _dequantise_once(path.absolute(), state.st_mtime_ns, state.st_size)


@cache
def _dequantise_once(path: Path, _written: int, _size: int) -> Path:
    digest = _hash_file(path)
    place = gguf_kept.find_place(digest)
    files.make_cache_folder(place.parent)
    gguf_kept.sweep()
    with lock.hold_in_turn(place, f"makes or removes the base of {path}"):
        found = gguf_kept.find_made(digest)
        if found is None:
            found = place / path.stem
            with files.staged_folder(found) as staging:
                _make(path, digest, staging)
        gguf_kept.hold(found)
    ui.say(f"{path.name}: {_describe(found)}")
    return found


def find_again(source: GGUFSource) -> Path | None:
    """Return the folder of a base that was made from a GGUF file, which is made anew where the file
    is still what it was; None where neither is here."""
    found = gguf_kept.find_made(source.sha256)
    if found is not None:
        return found
    path = Path(privacy.expand_home(source.file))
    # a stranger's record names the file: another one than it says is not opened
    if not path.is_file() or _hash_file(path) != source.sha256:
        return None
    return dequantise(path)


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(folder: Path) -> str:
    source = GGUFSource.read(folder / gguf_kept.SOURCE)
    return (
        f"dequantised from {source.type} to {source.dtype}, in {privacy.replace_home(str(folder))}"
    )


def _make(path: Path, digest: str, folder: Path) -> None:
    """Write the model of a GGUF file, with its tokenizer and what it is made from, and check it."""
    layout = gguf_reading.read_layout(path)
    needed = layout.written + BESIDE * layout.items
    if shutil.disk_usage(folder).free < needed:
        raise _explain_no_room(path, needed, folder)
    kind = layout.kind
    ui.say(f"{path.name}: its weights, most of them {kind}, are dequantised to 16 or 32 bits, once")
    try:
        dtype, checked = gguf_reading.write_model(path, layout, folder)
    except OSError as error:
        if error.errno not in library_errors.NO_ROOM:
            raise
        raise _explain_no_room(path, needed, folder) from error
    if importlib.util.find_spec("xllamacpp") is not None:
        checked += f"; {gguf_in_llama.check_in_llama(path, folder, layout.make_llama_limits())}"
    ui.say(f"  {checked}")
    where = str(privacy.make_portable(str(path)))
    source = GGUFSource(file=where, sha256=digest, type=kind, dtype=dtype)
    files.write_json(folder / gguf_kept.SOURCE, source.to_data())


def _explain_no_room(path: Path, needed: int, folder: Path) -> LoraError:
    """Return the error for a cache on a disk without room for a model."""
    home = files.find_cache_home()
    free = shutil.disk_usage(folder).free
    return LoraError(
        f"{path} dequantised takes {_format(needed)}, and {home} has room for {_format(free)}",
        f"df -h {quote(plain_files.find_existing(home))}; lora cache shows what it holds; or set "
        "LORA_CACHE_DIR to another folder",
    )


def _format(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
