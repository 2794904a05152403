"""`lora cache`: what lora keeps in its cache, how large it is, and removing a base from it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import LoraError, UsageError, files, privacy, ui
from lora_cli.models import gguf_kept

KINDS = (
    ("rows", "prepared rows", f"what is not used for {files.DAYS} days goes by itself"),
    ("fetched", "downloaded rows", f"what is not used for {files.DAYS} days goes by itself"),
    ("reference", "log-probabilities", f"what is not used for {files.DAYS} days goes by itself"),
    ("llama.cpp-*", "llama.cpp's converters", "lora setup-llama-cpp installs them again"),
)
"""Folders of the cache, what they hold, and what becomes of it."""
SHORT = 12
"""Digits of a sha256 that are shown."""


class Part(NamedTuple):
    """A kind of what the cache holds."""

    what: str
    entries: int
    size: int
    rule: str


def show_cache(removed: Sequence[str], as_json: bool) -> None:
    """List what the cache holds, after the bases that are called so were removed from it.

    UsageError for a name that none has, or several; LoraError for a base in use.
    """
    for each in {found.folder: found for found in map(_find_base, removed)}.values():
        gguf_kept.remove(each)
        ui.say(f"removed {privacy.replace_home(str(each.folder))}: {format_size(each.size)}")
    bases, parts = gguf_kept.list_kept(), list(list_parts())
    if as_json:
        ui.report_json(
            {
                "folder": str(files.find_cache_home()),
                "bases": [_describe(each) for each in bases],
                "others": [each._asdict() for each in parts],
            }
        )
        return
    for line in _list_bases(bases):
        ui.report(line)
    rows = [[each.what, str(each.entries), format_size(each.size), each.rule] for each in parts]
    if rows:
        ui.report(*ui.format_table(["others", "entries", "size", ""], rows), "")
    ui.report(f"in {privacy.replace_home(str(files.find_cache_home()))}")


def measure_cache() -> tuple[int, int]:
    """Return the bytes of all that the cache holds, and of its bases made of GGUF files."""
    return files.measure(files.find_cache_home()), files.measure(gguf_kept.find_home())


def list_parts() -> Iterator[Part]:
    """Yield what the cache holds beside bases, where there is any of it."""
    for pattern, what, rule in KINDS:
        found = list(files.find_cache_home().glob(pattern))
        entries = sum(1 for folder in found for each in folder.iterdir())
        if entries:
            count = len(found) if "*" in pattern else entries
            yield Part(what, count, sum(map(files.measure, found)), rule)


def format_size(size: float) -> str:
    """Return a size such as `12.3 GB`, or `123.4 MB` below one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _list_bases(bases: Sequence[gguf_kept.Kept]) -> Iterator[str]:
    if not bases:
        yield from ["no base that was made of a GGUF file", ""]
        return
    header = ["base", "made from", "sha256", "size", "used last", "its file", "in use by"]
    rows = [
        [
            each.folder.name,
            _name_source(each),
            each.digest[:SHORT],
            format_size(each.size),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used)),
            ("here" if _has_file(each) else "gone") if each.source else "unknown",
            ", ".join(each.users) or "nobody",
        ]
        for each in bases
    ]
    yield from ui.format_table(header, rows)
    if unused := [each for each in bases if not each.users]:
        yield f"lora cache --remove {unused[-1].digest[:SHORT]} removes the one unused longest"
    yield ""


def _name_source(kept: gguf_kept.Kept) -> str:
    if kept.source is None:
        return f"{gguf_kept.SOURCE} is damaged"
    return f"{Path(kept.source.file).name} ({kept.source.type})"


def _describe(kept: gguf_kept.Kept) -> dict[str, object]:
    return {
        "name": kept.folder.name,
        "folder": str(kept.folder),
        "made_from": kept.source.to_data() if kept.source else None,
        "size": kept.size,
        "used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(kept.used)),
        "file_is_here": _has_file(kept),
        "users": kept.users,
    }


def _has_file(kept: gguf_kept.Kept) -> bool:
    """Return whether the GGUF file is where it was: the base can be made again."""
    source = kept.source
    return source is not None and Path(privacy.expand_home(source.file)).is_file()


def _find_base(name: str) -> gguf_kept.Kept:
    """Return the base of a name, or of a sha256 that begins so."""
    bases = gguf_kept.list_kept()
    found = [
        each
        for each in bases
        if each.folder.name == name or (len(name) >= 6 and each.digest.startswith(name))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"--remove: no base in the cache is called {name}", "lora cache lists them"
        )
    raise LoraError(
        f"--remove: {len(found)} bases in the cache are called {name}",
        f"give a sha256: {', '.join(each.digest[:SHORT] for each in found)}",
    )
