"""Read and write what a GGUF file holds before its weights, byte for byte.

As ggml/include/gguf.h describes it (versions 2 and 3, which are laid out alike): magic, version,
counts; the metadata; an entry per tensor; padding; the weights, each tensor padded to the
alignment. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.common import gguf_values

VERSION = 3
ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT, in bytes; llama-quantize writes files of no other."""


class Tensor(NamedTuple):
    """One tensor's entry. `shape` is from the inside out, as ggml counts: its first number is the
    length of a row. `type` is ggml's number; `offset` counts bytes from where the weights begin."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class Header(NamedTuple):
    """What stands before the weights, `data_start` bytes in all. A value of `metadata` is kept as
    it is in the file: four bytes of type, then the content."""

    metadata: dict[str, bytes]
    tensors: list[Tensor]
    data_start: int

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key` in Python's types (arrays as lists), or `default`."""
        return _decode(self.metadata[key]) if key in self.metadata else default


def read_header(view: memoryview) -> Header:
    """Read the header of the GGUF whose bytes are `view`.

    Raises ValueError for what is no GGUF, is of version 1, or ends too early.
    """
    try:
        return _read_header(view)
    except (struct.error, KeyError) as error:
        raise ValueError(f"the header is damaged: {error}") from error


def text(value: bytes) -> bytes:
    """Encode a string as a value of the metadata."""
    return struct.pack("<I", gguf_values.TEXT) + _sized(value)


def uint32(value: int) -> bytes:
    """Encode a whole number as a value of the metadata."""
    return struct.pack("<II", gguf_values.UINT32, value)


def header(metadata: Mapping[str, bytes], tensors: Sequence[Tensor]) -> bytes:
    """Make the bytes before the weights, padding included; `offset` of each tensor is where it goes
    in the file."""
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    parts += [_sized(key.encode()) + value for key, value in metadata.items()]
    for each in tensors:
        shape = trimmed(each.shape)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        parts.append(
            _sized(each.name.encode()) + sizes + struct.pack("<IQ", each.type, each.offset)
        )
    written = b"".join(parts)
    return written + bytes(padding(len(written)))


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without dimensions of 1 at its end, as ggml counts dimensions."""
    num = max((at for at, size in enumerate(shape, start=1) if size > 1), default=1)
    return shape[:num]


def padding(size: int) -> int:
    """Return the bytes that fill `size` up to a multiple of ALIGNMENT."""
    return -size % ALIGNMENT


def _sized(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _read_header(view: memoryview) -> Header:
    magic, version, num_tensors, num_values = struct.unpack_from("<4sIQQ", view)
    if magic != b"GGUF" or version not in (2, VERSION):
        raise ValueError(
            f"it starts with {magic!r}, version {version}: not as GGUF does, version 2 or 3"
        )
    at, metadata, tensors = 24, {}, []
    for _ in range(num_values):
        key, at = _read_text(view, at)
        end = _end(view, at + 4, *struct.unpack_from("<I", view, at))
        metadata[key.decode()] = bytes(view[at:end])
        at = end
    for _ in range(num_tensors):
        name, at = _read_text(view, at)
        (dims,) = struct.unpack_from("<I", view, at)
        *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", view, at + 4)
        at += 4 + 8 * dims + 12
        tensors.append(Tensor(name.decode(), tuple(shape), kind, offset))
    found = Header(metadata, tensors, at)
    alignment = found.get("general.alignment", ALIGNMENT)
    if alignment != ALIGNMENT:
        raise ValueError(f"its tensors are aligned to {alignment!r} bytes, not to {ALIGNMENT}")
    return found._replace(data_start=at + padding(at))


def _read_text(view: memoryview, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", view, at)
    if at + 8 + size > len(view):
        raise ValueError("the header is damaged: a text ends after the file")
    return bytes(view[at + 8 : at + 8 + size]), at + 8 + size


def _end(view: memoryview, at: int, kind: int) -> int:
    """Return where the value that begins at `at` ends."""
    if kind == gguf_values.TEXT:
        return _read_text(view, at)[1]
    if kind != gguf_values.ARRAY:
        return at + struct.calcsize(gguf_values.SCALARS[kind])
    inner, num = struct.unpack_from("<IQ", view, at)
    at += 12
    if inner != gguf_values.TEXT:
        return at + num * struct.calcsize(gguf_values.SCALARS[inner])
    for _ in range(num):
        at = _read_text(view, at)[1]
    return at


def _decode(value: bytes) -> Any:
    (kind,) = struct.unpack_from("<I", value)
    if kind == gguf_values.TEXT:
        return value[12:].decode()
    if kind != gguf_values.ARRAY:
        return struct.unpack_from(f"<{gguf_values.SCALARS[kind]}", value, 4)[0]
    inner, num = struct.unpack_from("<IQ", value, 4)
    if inner in gguf_values.SCALARS:
        return list(struct.unpack_from(f"<{num}{gguf_values.SCALARS[inner]}", value, 16))
    texts, at, view = [], 16, memoryview(value)
    for _ in range(num):
        item, at = _read_text(view, at)
        texts.append(item.decode())
    return texts
