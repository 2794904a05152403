"""Quantise a GGUF: the files of llama.cpp's `llama-quantize`, byte for byte, without that program.

The blocks are made by ggml's own quantiser, which xllamacpp's library (the `gguf` extra) holds
under its C name, `ggml_quantize_chunk` (ggml/include/ggml.h). Which type a tensor gets says
`mixture.py`; what is written around the tensors is that of `llama_model_quantize_impl`
(src/llama-quant.cpp) and tools/quantize/quantize.cpp, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lora_cli.common import LoraError, Progress, files, quote, warn
from lora_cli.gguf import header, mixture
from lora_cli.gguf.ggml import EXACT, Ggml
from lora_cli.gguf.header import Header, Tensor
from lora_cli.gguf.mixture import KINDS, Choice

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION."""
CHUNK = 2**20
"""Elements that one thread quantises at a time: 4 MB in float32."""
DIGEST = 16
"""Bytes of the digest of a tensor."""
LONGEST_TEXT = 127
"""Bytes of a text that llama-quantize writes into the metadata."""


class Weights(NamedTuple):
    """An importance matrix: the mean square of each input column by tensor (float32; one row after
    another where there are several experts), and what the file says of where it comes from."""

    by_tensor: dict[str, np.ndarray]
    dataset: str | None
    num_chunks: int
    file: str


def quantize(
    source: Path,
    target: Path,
    kind: str,
    imatrix: Path | None = None,
    num_threads: int | None = None,
    announced: bool = True,
) -> dict[str, str]:
    """Write the GGUF `source` (f32, f16 or bf16) as `target`, of `kind` (one of KINDS), all at once
    or not at all; return a digest of each tensor that was quantised, by name.

    `imatrix` is an importance matrix as llama.cpp writes it. The bytes do not depend on
    `num_threads` (all processors). Warns of tensors that take a larger type because their rows do
    not divide into blocks, where that is to be `announced`. Raises LoraError for a source that is
    quantised already or holds values that are not finite, for an importance matrix of another
    model, for one that is missing, and where there is no ggml; `target` is then untouched.
    """
    ggml, data, weights = Ggml(), map_file(source), read_weights(imatrix) if imatrix else None
    model = _read_model(source, data)
    choices = mixture.choose(model, kind, weights is not None, ggml.block)
    by_tensor = _find_columns(choices, kind, weights)
    _refuse_quantized(ggml, choices)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch_folder(target.parent.resolve()) as folder:
        made, digests = folder / "model.gguf", {}
        with made.open("wb") as file, ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            file.write(_make_header(ggml, model, choices, kind, weights))
            progress, tensors = Progress(), data[model.data_start :]
            for done, choice in enumerate(choices):
                progress.update(f"quantising to {kind}: {100 * done // len(choices)}%")
                name = choice.tensor.name
                columns = by_tensor.get(name)
                digests[name] = _write_tensor(file, ggml, tensors, choice, columns, pool)
            progress.clear()
        made.replace(target)
    if announced:
        _announce_narrower(choices, kind)
        if weights:
            _announce_unweighted(choices, by_tensor)
    return digests


def _announce_narrower(choices: list[Choice], kind: str) -> None:
    if narrower := sum(choice.narrower for choice in choices):
        warn(
            f"{narrower} of {len(choices)} tensors take a larger type: their rows do not fit "
            f"{kind}'s blocks"
        )


def _announce_unweighted(choices: list[Choice], by_tensor: Mapping[str, np.ndarray]) -> None:
    """Warn of tensors that are rounded without the importance matrix, but for embeddings, which
    have no columns in it, and a head, which llama.cpp's may lack."""
    rounded = [choice.tensor.name for choice in choices if choice.type not in (None, *EXACT)]
    ends = (*mixture.EMBEDDINGS, "output.weight")
    bare = [name for name in rounded if name not in by_tensor and name not in ends]
    if bare:
        warn(
            f"{len(bare)} of {len(rounded)} rounded tensors are not in the importance matrix, such "
            f"as {bare[0]}: all their columns weigh alike"
        )


def map_file(path: Path) -> np.ndarray:
    """Map the bytes of `path` (uint8), read from disk as they are used. Raises LoraError where
    there are none."""
    if not path.is_file() or not path.stat().st_size:
        raise LoraError(f"{path} is missing or empty", f"ls -l {quote(path)}")
    return np.memmap(path, np.uint8, "r")


def read_weights(path: Path) -> Weights:
    """Read the importance matrix in `path`, a GGUF or the format before that (tools/quantize,
    common/imatrix-loader.cpp).

    Raises LoraError for a file that is neither, and for values that are not finite.
    """
    data = map_file(path)
    try:
        found = (
            _read_gguf_weights(data, path)
            if bytes(data[:4]) == b"GGUF"
            else _read_dat_weights(data, path)
        )
    except (ValueError, struct.error, KeyError) as error:
        raise LoraError(
            f"{path} is not an importance matrix: {error}", "--imatrix DATA.jsonl measures one"
        ) from error
    for name, columns in found.by_tensor.items():
        if not np.isfinite(columns).all():
            raise LoraError(
                f"{path} holds values for {name} that are not finite",
                "--imatrix DATA.jsonl measures one",
            )
    return found


def _read_gguf_weights(data: np.ndarray, path: Path) -> Weights:
    stored = header.read_header(data.data)
    arrays = {tensor.name: _float32(data[stored.data_start :], tensor) for tensor in stored.tensors}
    names = sorted(
        {name.rpartition(".")[0] for name in arrays if name.endswith((".in_sum2", ".counts"))}
    )
    if not names:
        raise ValueError("it holds no sums")
    by_tensor = {}
    for name in names:
        counts = np.rint(arrays[f"{name}.counts"]).reshape(-1, 1)
        sums = arrays[f"{name}.in_sum2"].reshape(len(counts), -1)
        # an expert that never saw a token weighs all its columns alike
        seen = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        by_tensor[name] = seen.reshape(-1)
    datasets, num_chunks = stored.get("imatrix.datasets"), stored.get("imatrix.chunk_count")
    said = (
        isinstance(datasets, list)
        and isinstance(num_chunks, int)
        and "imatrix.chunk_size" in stored.metadata
    )
    if not said:
        raise ValueError("it does not say what it was measured on")
    return Weights(by_tensor, str(datasets[0]) if datasets else None, num_chunks, path.name)


def _read_dat_weights(data: np.ndarray, path: Path) -> Weights:
    """Entries of (name, number of calls, sums), then the number of chunks and the data set's name,
    if at all."""
    view, at, by_tensor = data.data, 4, {}
    (num,) = struct.unpack_from("<i", view)
    if num < 1:
        raise ValueError("it holds no sums")
    for _ in range(num):
        (size,) = struct.unpack_from("<i", view, at)
        name, calls, columns = struct.unpack_from(f"<{size}sii", view, at + 4)
        at += 4 + size + 8
        sums = np.frombuffer(view, "<f4", columns, at)
        at += sums.nbytes
        by_tensor[name.decode()] = sums / np.float32(calls) if calls > 0 else sums
    num_chunks, dataset = 0, None
    if at < len(view):
        num_chunks, size = struct.unpack_from("<ii", view, at)
        dataset = bytes(view[at + 8 : at + 8 + size]).decode()
    return Weights(by_tensor, dataset or None, num_chunks, path.name)


def _float32(weights: np.ndarray, tensor: Tensor) -> np.ndarray:
    num = math.prod(tensor.shape)
    if tensor.type != 0 or tensor.offset + 4 * num > weights.size:
        raise ValueError(f"{tensor.name} is not float32, or ends after the file")
    return np.frombuffer(weights, "<f4", num, tensor.offset)


def _read_model(source: Path, data: np.ndarray) -> Header:
    try:
        return header.read_header(data.data)
    except ValueError as error:
        raise LoraError(f"{source} cannot be quantised: {error}", "export it again") from error


def _find_columns(
    choices: list[Choice], kind: str, weights: Weights | None
) -> dict[str, np.ndarray]:
    """Find the importance matrix's part for each tensor that is quantised. Raises LoraError where
    it does not fit."""
    found = {}
    for tensor, type_name, _ in choices:
        columns = weights.by_tensor.get(tensor.name) if weights and type_name else None
        num = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if columns is not None and columns.size == num:
            found[tensor.name] = columns
        elif columns is not None and tensor.name not in mixture.EMBEDDINGS:
            raise LoraError(
                f"the importance matrix has {columns.size} columns for {tensor.name}, which has "
                f"{num}",
                "it is another model's: --imatrix DATA.jsonl measures one",
            )
        elif mixture.needs_weights(tensor.name, type_name, kind):
            way = "--imatrix DATA.jsonl measures one"
            if weights:  # lora's own is of linear modules, and transformers' experts are none
                way = "it is another model's, or lacks experts, which llama.cpp's llama-imatrix has"
            raise LoraError(
                f"{kind} needs an importance matrix that says how much the columns of "
                f"{tensor.name} matter",
                f"{way}; Q2_K, Q3_K_M, IQ3_S, IQ4_XS and Q4_K_M need none",
            )
    return found


def _refuse_quantized(ggml: Ggml, choices: list[Choice]) -> None:
    for tensor, type_name, _ in choices:
        stored = ggml.names.get(tensor.type, str(tensor.type))
        if type_name not in (None, stored) and stored not in EXACT:
            raise LoraError(
                f"the model is already quantised ({tensor.name} is {stored})",
                "pass an f16 or bf16 GGUF",
            )


def _make_header(
    ggml: Ggml, model: Header, choices: list[Choice], kind: str, weights: Weights | None
) -> bytes:
    """Make all that comes before the tensors. The keys that quantising changes come last, as
    llama-quantize puts them."""
    changed = {
        "general.quantization_version": header.uint32(QUANTIZATION_VERSION),
        "general.file_type": header.uint32(KINDS[kind].number),
    }
    if weights:
        changed["quantize.imatrix.file"] = header.text(weights.file.encode()[:LONGEST_TEXT])
        if weights.dataset is not None:
            changed["quantize.imatrix.dataset"] = header.text(
                weights.dataset.encode()[:LONGEST_TEXT]
            )
        changed["quantize.imatrix.entries_count"] = header.uint32(len(weights.by_tensor))
        if weights.num_chunks > 0:
            changed["quantize.imatrix.chunks_count"] = header.uint32(weights.num_chunks)
    kept = {
        key: value
        for key, value in model.metadata.items()
        if key not in changed and not key.startswith("split.")
    }
    tensors, offset = [], 0
    for tensor, type_name, _ in choices:
        name = type_name or ggml.names[tensor.type]
        tensors.append(Tensor(tensor.name, tensor.shape, ggml.numbers[name], offset))
        size = ggml.num_bytes(name, tensor.shape)
        offset += size + header.padding(size)
    return header.header(kept | changed, tensors)


def _write_tensor(
    file: BinaryIO,
    ggml: Ggml,
    weights: np.ndarray,
    choice: Choice,
    columns: np.ndarray | None,
    pool: ThreadPoolExecutor,
) -> str:
    """Write one tensor and its padding, and return its digest; `weights` are all the source's bytes
    after its header."""
    tensor, stored = choice.tensor, ggml.names[choice.tensor.type]
    size = ggml.num_bytes(stored, tensor.shape)
    given = weights[tensor.offset : tensor.offset + size]
    if given.size != size or not ggml.is_valid(given, stored):
        said = "values that are not finite" if given.size == size else "fewer bytes than it should"
        raise LoraError(
            f"{tensor.name} holds {said}", "merge again; lora verify looks for what is wrong"
        )
    pieces: Iterable[np.ndarray] = [given]
    if choice.type not in (None, stored):
        pieces = pool.map(
            lambda part: ggml.quantize(*part),
            _parts(ggml, given, tensor, stored, choice.type, columns),
        )
    hashed, written = hashlib.blake2b(digest_size=DIGEST), 0
    for blocks in pieces:
        if not ggml.is_valid(blocks, choice.type or stored):
            raise LoraError(
                f"{tensor.name} has values too large for {choice.type}", "another type, or -q bf16"
            )
        hashed.update(blocks.data)
        written += file.write(blocks.data)
    file.write(bytes(header.padding(written)))
    return hashed.hexdigest()


def _parts(
    ggml: Ggml,
    given: np.ndarray,
    tensor: Tensor,
    stored: str,
    type_name: str,
    columns: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, str, np.ndarray | None]]:
    """Yield some rows at a time, never of two experts, since each has its own part of the
    importance matrix."""
    width, per_expert = tensor.shape[:2]
    rows = given.reshape(-1, given.size // math.prod(tensor.shape[1:]))
    step = max(1, CHUNK // width)
    for first in range(0, len(rows), per_expert):
        expert = first // per_expert
        mine = None if columns is None else columns[expert * width : (expert + 1) * width]
        for start in range(first, first + per_expert, step):
            yield (
                ggml.dequantize(rows[start : min(start + step, first + per_expert)], stored, width),
                type_name,
                mine,
            )
