"""Look through everything that is to be uploaded, right before it is, for what must not leave:
secrets, and places of this machine."""

from __future__ import annotations

import mmap
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_cli.common import LoraError, plain_files, privacy, quote
from lora_cli.publish.outgoing import Outgoing

WEIGHTS = (".safetensors", ".model")
"""Files that are no text, beside GGUFs."""
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Files of words, any of which a tokenizer may have: `/root` is one."""

ADDRESS = r"(?<=://)|(?<=://localhost)"
"""What a path of this machine follows in the address of a file."""
SPACE, SLASH = re.compile(r"\\+[bfnrt]"), re.compile(r"\\(?:/|u002[fF])")
"""How JSON spells what stands before a path, and in one."""


def refuse_private(sent: Iterable[Outgoing], places: Sequence[str]) -> None:
    """Raise LoraError for the first file with a secret that the environment or the shape of a text
    gives away, or one of `places`, folders of this machine; it names file and line, not the
    secret."""
    for each in sent:
        if _holds_weights(each):
            _refuse_in_weights(each, places)
            continue
        content = each.content if isinstance(each.content, bytes) else each.content.read_bytes()
        text = content.decode("utf-8", "replace")
        if _find_in_text(text, each.name, places) is None:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := _find_in_text(line, each.name, places):
                raise _refuse(f"{each.name}:{number}", found, each)
        raise _refuse(each.name, _find_in_text(text, each.name, places) or "", each)


def _holds_weights(each: Outgoing) -> bool:
    """Return whether a file is no text."""
    is_gguf = isinstance(each.content, Path) and plain_files.is_gguf(each.content)
    return is_gguf or each.name.endswith(WEIGHTS)


def _refuse(where: str, found: str, each: Outgoing) -> LoraError:
    file = each.name if isinstance(each.content, bytes) else quote(each.content)
    return LoraError(f"{where} holds {found}: nothing was uploaded", f"take it out of {file}")


def _find_in_text(text: str, name: str, places: Sequence[str]) -> str | None:
    """Return what a text holds that must not leave."""
    if name not in WORDS and (held := privacy.find_held_secret(text)):
        return held[1]
    if name in WORDS and (known := _find_known(text.encode())):
        return known
    after = "(?=/)" if name in WORDS else r"(?![\w-])"
    for place in places:
        shape = re.compile(rf"(?:(?<![\w./~-])|{ADDRESS}){re.escape(place)}{after}")
        if any(shape.search(spelt) for spelt in _spell(text)):
            return f"a folder of this machine, {place}"
    return None


def _spell(text: str) -> Iterator[str]:
    """Yield a text as it is, as JSON and as an address would read it."""
    yield text
    if "\\" in text:
        yield SLASH.sub("/", SPACE.sub(" ", text))
    if "%" in text:
        yield urllib.parse.unquote(text)


def _refuse_in_weights(each: Outgoing, places: Sequence[str]) -> None:
    """Look for known secrets, and for places, in every byte of weights and what stands before
    them."""
    assert isinstance(each.content, Path), "weights are never copied"
    if not each.size:
        return
    with each.content.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with content:
            found = _find_known(content)
            for place in places:
                if content.find(f"{place}/".encode()) >= 0:
                    found = found or f"a folder of this machine, {place}"
    if found:
        raise _refuse(each.name, found, each)


def _find_known(content: bytes | mmap.mmap) -> str | None:
    """Return which secret of the environment stands in bytes."""
    for name, value in privacy.find_secrets():
        if content.find(value.encode("utf-8", "surrogateescape")) >= 0:
            return f"the value of {name}"
    return None


def find_places(paths: Iterable[Path | str]) -> list[str]:
    """Return the folders of this machine that no file may name: the home folder, the current one,
    and these, without what is too short to be told from other words."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises where there is none
    given = [Path(each).absolute() for each in (home, Path.cwd(), *paths) if str(each) != "~"]
    found = [str(each) for path in given for each in (path, path.resolve())]
    return [each for each in dict.fromkeys(found) if each.startswith("/") and len(each) > 4]
