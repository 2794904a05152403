"""Look through a stranger's GGUF file up to its weights: the program that `gguf_reading.py` runs in
a process of its own, before a library believes any of it. Two tables of types and the standard
library only.

The layout is that of ggml/include/gguf.h, versions 2 and 3; all numbers are little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from typing import IO, Any, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lora_cli.common import gguf_values

MOST_VALUES, MOST_TENSORS = 2**16, 2**17
"""Entries of a header; known files have some fifty values, and 20,000 tensors at most."""
MOST_ITEMS = 2**22
"""Items of all arrays together; a vocabulary of 262,144 tokens has 1.3 million with its merges."""
LONGEST_NAME, LONGEST_TOKEN, LONGEST_TEMPLATE = 2**10, 2**14, 2**20
"""Bytes of a name, a token, a chat template."""
MOST_DIMENSIONS = 4
TOKENS = "tokenizer.ggml.tokens"
BESIDE_TOKENS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
"""What has an item for each token."""


class Refused(Exception):
    """What is wrong with a file, in words."""


class Header:
    """A file that is read from its beginning, as far as its tensors' entries."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.items = 0
        self.values: dict[str, Any] = {}
        """The single values, and of arrays how many items they have."""
        self.tensors: dict[str, tuple[GGMLQuantizationType, int]] = {}
        """Type, and how many numbers."""

    def read(self) -> None:
        """Read it all, or raise Refused."""
        magic, version, num_tensors, num_values = struct.unpack("<4sIQQ", self._take(24))
        if magic != b"GGUF":
            refuse(f"it begins with {magic!r}, and not with GGUF")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            refuse("its numbers are big-endian" if swapped else f"it is of version {version:,}")
        if num_values > MOST_VALUES or num_tensors > MOST_TENSORS:
            refuse(f"it claims {num_values:,} values and {num_tensors:,} tensors")
        for _ in range(num_values):
            self._read_entry()
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in [8 << n for n in range(14)]:
            refuse(f"general.alignment is {alignment!r}")
        spans = [self._read_tensor(alignment) for _ in range(num_tensors)]
        begin = -(-self.stream.tell() // alignment) * alignment
        refuse_spans(list(self.tensors), spans, self.size - begin)

    def _take(self, length: int) -> bytes:
        if length > self.size - self.stream.tell():
            refuse(f"it is cut short, or damaged, at byte {self.stream.tell():,}")
        return self.stream.read(length)

    def _take_numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take_text(self, what: str, most: int | None = None) -> str:
        (length,) = self._take_numbers("Q")
        if most is not None and length > most:
            refuse(f"{what} has {length:,} bytes, and at most {most:,} are read")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            refuse(f"{what} is not UTF-8")

    def _read_entry(self) -> None:
        key = self._take_text("the name of a value", LONGEST_NAME)
        if key in self.values:
            refuse(f"it has {key[:80]!r} twice")
        (kind,) = self._take_numbers("I")
        if kind == gguf_values.ARRAY:
            self.values[key] = self._skip_array(key)
        elif kind == gguf_values.TEXT:
            most = LONGEST_TEMPLATE if key.startswith("tokenizer.chat_template") else None
            self.values[key] = self._take_text(key[:80], most)
        elif kind in gguf_values.SCALARS:
            (self.values[key],) = self._take_numbers(gguf_values.SCALARS[kind])
        else:
            refuse(f"{key[:80]!r} is of a type {kind} that GGUF has not")

    def _skip_array(self, key: str) -> int:
        """Read over an array; return how many items it has."""
        kind, num = self._take_numbers("IQ")
        self.items += num
        if self.items > MOST_ITEMS:
            refuse(f"{key[:80]!r} claims {num:,} items, and at most {MOST_ITEMS:,} are read")
        if kind == gguf_values.TEXT:
            most = LONGEST_TOKEN if key == TOKENS else None
            for _ in range(num):
                self._take_text(f"an item of {key[:80]}", most)
        elif kind in gguf_values.SCALARS:
            self._take(num * struct.calcsize(gguf_values.SCALARS[kind]))
        else:
            refuse(f"{key[:80]!r} holds items of type {kind}, which no model has")
        return int(num)

    def _read_tensor(self, alignment: int) -> tuple[int, int]:
        """Read an entry; return where its bytes begin after the header, and how many there are."""
        name = self._take_text("the name of a tensor", LONGEST_NAME)
        if name in self.tensors:
            refuse(f"it has the tensor {name[:80]!r} twice")
        (dimensions,) = self._take_numbers("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            refuse(f"{name[:80]!r} has {dimensions:,} dimensions")
        *shape, kind, offset = self._take_numbers(f"{dimensions}QIQ")
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            refuse(f"{name[:80]!r} is of a type {kind} that the package gguf does not know")
        block, size = GGML_QUANT_SIZES[known]
        num = math.prod(shape)
        if not num or shape[0] % block or offset % alignment:
            refuse(f"{name[:80]!r} of shape {shape} cannot be {known.name} at byte {offset:,}")
        self.tensors[name] = known, num
        return offset, num // block * size


def refuse(why: str) -> NoReturn:
    """Raise Refused."""
    raise Refused(why)


def refuse_spans(names: list[str], spans: list[tuple[int, int]], room: int) -> None:
    """Raise Refused for tensors that lie outside a file with so much room for them, or in each
    other: a small file would become a large model."""
    end = 0
    for (offset, size), name in sorted(zip(spans, names)):
        if offset + size > room:
            refuse(
                f"{name[:80]!r} lies at bytes {offset:,} to {offset + size:,} of the weights, and "
                f"the file has {max(room, 0):,}"
            )
        if offset < end:
            refuse(f"{name[:80]!r} lies in another tensor")
        end = offset + size


def refuse_impossible(header: Header) -> None:
    """Raise Refused for lists of tokens that do not fit each other, and for more layers than there
    are tensors."""
    values = header.values
    num = values.get(TOKENS, 0)
    if not isinstance(num, int):
        refuse(f"{TOKENS} is {repr(num)[:80]}")
    for key in BESIDE_TOKENS:
        if values.get(key, num) != num:
            refuse(f"it has {num:,} tokens, and in {key} {values[key]!r}")
    layers = values.get(f"{values.get('general.architecture')}.block_count", 0)
    if not header.tensors:
        refuse("it has no tensors: it is a vocabulary, or the first part of a model")
    if isinstance(layers, (int, float)) and layers > len(header.tensors):
        refuse(f"it claims {layers:,} layers, and has {len(header.tensors):,} tensors")


def handle(shared: None, path: str) -> dict[str, Any]:
    """Return what the file at `path` holds: `kinds`, numbers by ggml's names of types; `numbers`,
    all of them; `largest`, those of the largest tensor; `items` of all arrays; `parts`, how many
    files the model has. Or `{"refused": why}`."""
    with open(path, "rb") as stream:  # noqa: PTH123 - pathlib takes long
        header = Header(stream)
        try:
            header.read()
            parts = header.values.get("split.count", 1)
            if not isinstance(parts, int):
                refuse(f"split.count is {repr(parts)[:80]}")
            if parts <= 1:
                refuse_impossible(header)
        except Refused as error:
            return {"refused": str(error)}
    kinds = Counter[str]()
    for kind, num in header.tensors.values():
        kinds[kind.name] += num
    return {
        "kinds": dict(kinds.most_common()),
        "numbers": kinds.total(),
        "largest": max((num for _, num in header.tensors.values()), default=0),
        "items": header.items,
        "parts": int(parts),
    }
