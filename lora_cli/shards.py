"""safetensors files read a few rows at a time and written in order, without holding or mapping a whole one.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header with type, shape and
offsets of each tensor, then the tensors' bytes. Mapped memory counts as the process's own, so files are read plainly.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from lora_cli import files
from lora_cli.errors import LoraError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
# Bytes of float32 worked on at a time: some rows of a tensor, small enough for a processor's cache
BLOCK = 4 * 2**20
WAITING = 4


class Entry(NamedTuple):
    """Where a tensor lies: its file, type, shape, and the offset of its first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of some safetensors files, by name, in the order of their bytes."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers. SafetensorError (as the library's own) for a file that is damaged or cut off."""
        self.entries: dict[str, Entry] = {}
        self.paths = list(paths)
        for path in self.paths:
            for name, entry in sorted(_header(path).items(), key=lambda pair: pair[1].start):
                self.entries[name] = entry
        self._open: dict[Path, IO[bytes]] = {}

    def names(self, path: Path) -> list[str]:
        """The tensors of one file."""
        return [name for name, entry in self.entries.items() if entry.file == path]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor along its first dimension, a new tensor of the file's type."""
        entry = self.entries[name]
        if not entry.shape:
            return self._read(entry, entry.start, ())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        shape = (stop - start, *entry.shape[1:])
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(entry, entry.start + start * row, shape)

    def _read(self, entry: Entry, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._open.get(entry.file)
        if file is None:
            file = self._open[entry.file] = entry.file.open("rb", buffering=0)
        data = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        view = memoryview(data.numpy())
        file.seek(offset)
        done = 0
        while done < len(view):  # the system reads at most 2 GiB at once
            read = file.readinto(view[done:])
            if not read:
                raise SafetensorError(f"{entry.file} is shorter than its header says")
            done += read
        return data.view(entry.dtype).reshape(shape)

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _header(path: Path) -> dict[str, Entry]:
    """The entries of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise SafetensorError(f"{path} is no safetensors file, or is cut off")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            raise SafetensorError(f"{path} has no safetensors header") from None
    header.pop("__metadata__", None)
    unknown = {tensor["dtype"] for tensor in header.values()} - TYPES.keys()
    if unknown:
        raise LoraError(f"{path} holds {sorted(unknown)[0]} weights, which are not merged into", "take a 16-bit base")
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise SafetensorError(f"{path} has {size} bytes, its header says {end}")
    return {
        name: Entry(path, TYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def open_model(name: str, revision: str | None = None) -> Tensors | None:
    """The weights of a model on the hub or in a folder; None where they are not in safetensors files."""
    index = _find(name, INDEX, revision)
    if index is not None:
        shards = sorted(set(files.read_json(index)["weight_map"].values()))
        return Tensors([path for shard in shards if (path := _find(name, shard, revision, required=True))])
    single = _find(name, SINGLE, revision)
    return None if single is None else Tensors([single])


def _find(name: str, file: str, revision: str | None, required: bool = False) -> Path | None:
    try:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=required)
    except (OSError, EntryNotFoundError) as error:
        raise LoraError(f"{name} lacks {file}, which its index names", "copy or download it again") from error
    return None if found is None else Path(found)


class Writer:
    """One safetensors file, its header first; the tensors follow in that order, from a thread of its own.

    Every value is looked at on its way: the first that is not finite raises LoraError.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.file = path.open("wb", buffering=0)
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.payload = offset
        self.size = self.file.tell() + offset

    def write(self, name: str, rows: torch.Tensor) -> None:
        """The next rows of the tensor whose turn it is; `name` is for the message when they are not finite."""
        if len(self.waiting) >= WAITING:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(self._write, name, rows))

    def _write(self, name: str, rows: torch.Tensor) -> None:
        if not finite(rows):
            raise LoraError(f"{name} of the merged model holds values that are not finite", "lora merge into float32")
        view = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            done += self.file.write(view[done:])

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            while self.waiting and error is None:
                self.waiting.popleft().result()
            assert error is not None or self.file.tell() == self.size, "not every tensor was written"
        finally:
            self.pool.shutdown()
            self.file.close()


def finite(rows: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: their sum is then finite too, which is one pass, but for huge values."""
    if not rows.is_floating_point() or torch.isfinite(rows.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(rows).all())


def write_index(folder: Path, places: Mapping[str, str], size: int) -> None:
    """The index of several shards: `places` is tensor name -> file name, `size` their tensors' bytes."""
    files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `BLOCK` bytes in float32 that cover a tensor of this shape, in order."""
    if not shape:
        yield 0, 1
        return
    step = max(1, BLOCK // max(1, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
