"""Which of the GGUF files in a folder hold a model: told by their first bytes and by their names,
without the package gguf, which need not be installed."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from pathlib import Path

from lora_cli.common import plain_files, quote

VERSIONS = (2, 3)
LOOKED_AT = 2**16
"""Bytes from the first, in which the general keys stand."""
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
NO_BASES = ("mmproj", "adapter", "imatrix", "vocab")
"""`general.type` of files that are no model, and what such files are called."""


def suggest_inside(folder: Path) -> str | None:
    """Return the hint that names the GGUF file in a folder that is a model: of several the largest,
    which was rounded least, and that there are others; of one in parts, how they are joined. None
    where there is no such file."""
    files = sorted(filter(plain_files.has_gguf_name, folder.iterdir()))
    models = [file for file in files if _is_model(file)]
    whole = [file for file in models if not PART.search(file.name)]
    if whole:
        best, *others = sorted(whole, key=lambda file: -file.stat().st_size)
        more = f" There are also {', '.join(file.name for file in others)}" if others else ""
        return f"did you mean {quote(best)}?{more}"
    first = next((file for file in models if "-00001-of-" in file.name), None)
    return f"llama-gguf-split --merge {quote(first)} whole.gguf joins its parts" if first else None


def _is_model(file: Path) -> bool:
    """Return whether a file begins as a GGUF with tensors, and is not said to be something else."""
    head = b""
    with suppress(OSError):  # a file that may not be read
        if file.is_file():
            with file.open("rb") as stream:
                head = stream.read(LOOKED_AT)
    if len(head) < 24 or head[:4] != b"GGUF":
        return False
    version, num_tensors = struct.unpack_from("<IQ", head, 4)
    said = {_read_text(head, key) for key in (b"general.type", b"general.architecture")}
    is_other = said & {*NO_BASES, "clip"} or any(word in file.name.lower() for word in NO_BASES)
    return version in VERSIONS and num_tensors > 0 and not is_other


def _read_text(head: bytes, key: bytes) -> str:
    """Return the text that a key of the metadata has; nothing where it is not among these bytes."""
    at = head.find(struct.pack("<Q", len(key)) + key)
    if at < 0:
        return ""
    at += 8 + len(key) + 4
    (length,) = struct.unpack_from("<Q", head.ljust(at + 8, b"\0"), at)
    return head[at + 8 : at + 8 + min(length, 99)].decode(errors="replace")
