"""Read safetensors files a few rows at a time, and write them in order, without holding a whole
one.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header
with type, shape and offsets of each tensor, then the tensors' bytes. Mapped memory counts as the
process's own, so files are read plainly.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from lora_cli.common import LoraError, RejectedError, files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
LONGEST_HEADER = 2**23
"""Bytes; one of 50,000 tensors has as many. As Python's objects they take ten times as much."""
# Bits of the exponent, which are all set in a NaN or an infinity alone
EXPONENT = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0xFF << 23,
    torch.bfloat16: 0xFF << 7,
    torch.float16: 0x1F << 10,
}
UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {
    8: np.uint64,
    4: np.uint32,
    2: np.uint16,
    1: np.uint8,
}
# Bytes of float32 worked on at a time, some rows of a tensor. Smaller blocks wait for Python,
# larger ones for memory (merging a GB with LoRA: 1.06 s at 2^20, 0.87 s here, 0.80 s at 2^21)
BLOCK = 3 * 2**19


class Entry(NamedTuple):
    """Where a tensor lies: its file, type, shape, and the offset of its first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of some safetensors files, by name, in the order of their bytes."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers. SafetensorError (as the library's own) for a file that is damaged or
        cut off."""
        self.entries: dict[str, Entry] = {}
        self.paths = list(paths)
        for path in self.paths:
            for name, entry in sorted(_read_header(path).items(), key=lambda pair: pair[1].start):
                self.entries[name] = entry

    def names(self, path: Path) -> list[str]:
        """Return the tensors of one file."""
        return [name for name, entry in self.entries.items() if entry.file == path]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor along its first dimension, a new tensor of the file's
        type."""
        entry = self.entries[name]
        if not entry.shape:
            return self._read(entry, entry.start, ())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        shape = (stop - start, *entry.shape[1:])
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(entry, entry.start + start * row, shape)

    def _read(self, entry: Entry, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        data = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        view = memoryview(data.numpy())
        done = 0
        with entry.file.open(
            "rb", buffering=0
        ) as file:  # one of its own, for threads read at the same time
            file.seek(offset)
            while done < len(view):  # the system reads at most 2 GiB at once
                read = file.readinto(view[done:])
                if not read:
                    raise SafetensorError(f"{entry.file} is shorter than its header says")
                done += read
        return data.view(entry.dtype).reshape(shape)


def _read_header(path: Path) -> dict[str, Entry]:
    """Read the entries of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise SafetensorError(f"{path} is not a safetensors file, or is cut off")
        try:
            header: dict[str, Any] = json.loads(file.read(min(length, LONGEST_HEADER)))
        except (ValueError, RecursionError):
            raise SafetensorError(f"{path} has no safetensors header") from None
    if not isinstance(header, dict) or not all(map(_is_entry, header.items())):
        raise SafetensorError(f"{path} has a header that is none of safetensors")
    header.pop("__metadata__", None)
    unknown = {tensor["dtype"] for tensor in header.values()} - TYPES.keys()
    if unknown:
        raise LoraError(
            f"{path} holds {sorted(unknown)[0]} weights, which lora cannot merge into",
            "take a 16-bit base",
        )
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise SafetensorError(f"{path} has {size} bytes, its header says {end}")
    return {
        name: Entry(
            path,
            TYPES[tensor["dtype"]],
            tuple(tensor["shape"]),
            8 + length + tensor["data_offsets"][0],
        )
        for name, tensor in header.items()
    }


def _is_entry(item: tuple[str, Any]) -> bool:
    """Return whether a header says of this tensor what safetensors' format asks for, sizes that
    agree among it."""
    name, entry = item
    if name == "__metadata__":
        return True
    try:
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        return False
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        return False
    return isinstance(kind, str) and (
        kind not in TYPES or end - start == math.prod(shape) * TYPES[kind].itemsize
    )


def open_model(name: str, revision: str | None = None) -> Tensors | None:
    """Open the weights of a model on the hub or in a folder; None where they are not in safetensors
    files."""
    single = _find_file(
        name, SINGLE, revision
    )  # first, as transformers: a model saved anew leaves an old index behind
    if single is not None:
        return Tensors([single])
    index = _find_file(name, INDEX, revision)
    if index is None:
        return None
    shards = _list_shards(index)
    return Tensors(
        [path for shard in shards if (path := _find_file(name, shard, revision, required=True))]
    )


def _list_shards(index: Path) -> list[str]:
    """List the files that an index names, all of them beside it. Raises LoraError for a broken
    index."""
    found = files.read_json(index)
    named = found.get("weight_map") if isinstance(found, dict) else None
    if (
        not isinstance(named, dict)
        or not named
        or not all(isinstance(file, str) for file in named.values())
        or not isinstance(found.get("metadata"), dict)  # transformers asks for it
    ):
        said = "it has no weight_map, or no metadata"
        raise LoraError(f"{index} is not an index of weights: {said}", "copy or download it again")
    if outside := [file for file in named.values() if Path(file).name != file or "\\" in file]:
        raise LoraError(
            f"{index} names a file in another folder, {outside[0]}",
            "take the model from its first source",
        )
    return sorted(set(named.values()))


def _find_file(name: str, file: str, revision: str | None, required: bool = False) -> Path | None:
    try:
        found = cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=required
        )
    except (OSError, EntryNotFoundError) as error:
        raise LoraError(
            f"{name} lacks {file}, which its index names", "copy or download it again"
        ) from error
    return None if found is None else Path(found)


def create_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Entry]:
    """Create a safetensors file with its header and room for these tensors (name -> type, shape);
    return where each goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + offset)
    return _read_header(path)


def fill_tensor(entry: Entry, name: str, pieces: Iterable[torch.Tensor]) -> int:
    """Write a tensor's pieces, in order, to their place; returns their checksum. LoraError for one
    not finite."""
    total = 0
    with entry.file.open("r+b", buffering=0) as file:
        file.seek(entry.start)
        for rows in pieces:
            if not is_finite(rows):
                raise RejectedError(
                    f"{name} of the merged model holds values that are not finite", "train again"
                )
            total += compute_checksum(rows)
            view = _view_bits(rows).view(np.uint8).data
            done = 0
            while done < len(view):
                done += file.write(view[done:])
        end = entry.start + math.prod(entry.shape) * entry.dtype.itemsize
        assert file.tell() == end, f"not all of {name} was written"
    return total % 2**64


def is_finite(rows: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite, on any device and without making anything of the
    tensor's size.

    On a CPU the exponent's bits tell, many times faster than torch.isfinite; elsewhere the least
    and greatest value.
    """
    if not rows.is_floating_point() or not rows.numel() or rows.is_meta:
        return True
    if rows.dtype not in EXPONENT:
        rows = rows.float()
    if rows.device.type != "cpu":
        least, greatest = torch.aminmax(rows)
        return bool(torch.isfinite(least) & torch.isfinite(greatest))
    mask = EXPONENT[rows.dtype]
    return bool((_view_bits(rows) & UNSIGNED[rows.dtype.itemsize](mask)).max() != mask)


def compute_checksum(rows: torch.Tensor) -> int:
    """Sum all bytes, eight at a time: changing any one value afterwards changes the sum."""
    data = _view_bits(rows).view(np.uint8)
    whole = len(data) // 8 * 8
    return int(data[:whole].view(np.uint64).sum(dtype=np.uint64)) + int.from_bytes(
        data[whole:].tobytes(), "little"
    )


def _view_bits(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    return (
        rows.contiguous().reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[rows.dtype.itemsize])
    )


def keep_memory() -> None:
    """Let the C library keep freed blocks of some megabytes, by freeing a larger one first.

    Otherwise glibc hands each of them back to the system, and fetching their pages again takes two
    thirds of the time of merging a block (measured: 0.5 against 1.5 GB/s).
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)


def give_back_memory() -> None:
    """Hand freed memory back to the system after `keep_memory`, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def find_changed(folder: Path, sums: Mapping[str, int]) -> str | None:
    """Return the first tensor of a folder's files that differs from what was written, by its
    checksum; None if none does."""
    tensors = open_model(str(folder))
    assert tensors is not None, "written just now"
    if tensors.entries.keys() != sums.keys():
        return min(tensors.entries.keys() ^ sums.keys())

    def total(name: str) -> int:
        shape = tensors.entries[name].shape
        return (
            sum(
                compute_checksum(tensors.rows(name, start, stop))
                for start, stop in split_rows(shape)
            )
            % 2**64
        )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        totals = pool.map(total, sums)
        return next((name for name, now in zip(sums, totals) if now != sums[name]), None)


def write_index(folder: Path, places: Mapping[str, Entry]) -> None:
    """Write the index of files that are several, or one of another name."""
    size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in places.values())
    shard_of = {name: entry.file.name for name, entry in sorted(places.items())}
    files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": shard_of})


def split_rows(shape: tuple[int, ...], size: int | None = None) -> Iterator[tuple[int, int]]:
    """Split a tensor of this shape into ranges of rows of about `size` bytes (`BLOCK`) in float32,
    in order.

    Each but the last has a multiple of eight values, so that checksums do not depend on the ranges.
    """
    if not shape:
        yield 0, 1
        return
    row = math.prod(shape[1:])
    step = max(1, (size or BLOCK) // max(1, 4 * row))
    if row % 8:
        step = max(8, step // 8 * 8)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
