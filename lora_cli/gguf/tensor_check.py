"""Compare the tensors of a GGUF, one by one, with those of the exact GGUF it was rounded from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lora_cli.common import LoraError, Progress
from lora_cli.gguf import header, quantize
from lora_cli.gguf.ggml import EXACT, Ggml
from lora_cli.gguf.header import Header, Tensor

CHUNK = 2**22
"""Elements that are compared at a time by one thread: 16 MB in float32, some times over."""
BLOCK = 32
"""Weights that share a scale in q8_0."""
TOO_LARGE = "weights too large"
REPORT = "report it, with the model's name"


class Rounded(NamedTuple):
    """How far some rows lie from the exact ones: `wrong` weights are farther than their type's
    rounding puts them; the sums of squares are of the error and of the exact weights. `infinite`:
    some are over the type's range."""

    wrong: int
    error: float = 0.0
    size: float = 0.0
    infinite: bool = False


def compare_tensors(file: Path, exact: Path, digests: Mapping[str, str]) -> str:
    """Compare every tensor of `file` with that of the same name in `exact` and return the result in
    words.

    float32, float16 and bfloat16 must be the exact weight rounded once; q8_0 within half a step of
    it, and the rounding of the scale (float16). Of other types the bytes must be those that the
    quantiser made (`digests`, by name), and the error no larger than `_limit_error`. Raises
    LoraError naming the tensors that differ.
    """
    ggml = Ggml()
    given, wanted = (_Open(path) for path in (file, exact))
    if {each.name: each.shape for each in given.header.tensors} != {
        each.name: each.shape for each in wanted.header.tensors
    }:
        raise LoraError(f"{file.name} holds other tensors than the model it was made from", REPORT)
    sources = {each.name: each for each in wanted.header.tensors}
    wrong, progress = [], Progress()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, torch.get_num_threads() + 1)) as pool:
        for done, tensor in enumerate(given.header.tensors):
            progress.update(f"comparing tensors: {100 * done // len(given.header.tensors)}%")
            said = _judge(ggml, given, wanted, tensor, sources[tensor.name], digests, pool)
            if said:
                wrong.append(f"{tensor.name} {said}")
    progress.clear()
    if any(TOO_LARGE in said for said in wrong):
        raise LoraError(
            f"{file.name} cannot hold the model: {'; '.join(wrong[:3])}",
            "-q bf16, whose range is that of float32",
        )
    if wrong:
        raise LoraError(
            f"{file.name} does not hold the weights it was made from: {'; '.join(wrong[:3])} "
            f"({len(wrong)} of {len(sources)} tensors)",
            REPORT,
        )
    return f"{len(sources)} of {len(sources)} tensors as their types round"


class _Open:
    """A GGUF's header and its weights, mapped."""

    def __init__(self, path: Path) -> None:
        self.data = np.memmap(path, np.uint8, "r")
        self.header: Header = header.read_header(self.data.data)

    def read(self, ggml: Ggml, tensor: Tensor) -> np.ndarray:
        """Return the tensor's bytes, a row of weights each."""
        name = ggml.names[tensor.type]
        start = self.header.data_start + tensor.offset
        size = ggml.num_bytes(name, tensor.shape)
        return self.data[start : start + size].reshape(prod(tensor.shape[1:]), -1)


def _judge(
    ggml: Ggml,
    given: _Open,
    wanted: _Open,
    tensor: Tensor,
    source: Tensor,
    digests: Mapping[str, str],
    pool: ThreadPoolExecutor,
) -> str | None:
    """Return what is wrong with a tensor, or None."""
    name, stored = ggml.names[tensor.type], ggml.names[source.type]
    rows, exact = given.read(ggml, tensor), wanted.read(ggml, source)
    if name == stored:
        return None if np.array_equal(rows, exact) else "was changed on the way"
    width = tensor.shape[0]
    step = max(1, CHUNK // width)

    def compare(start: int) -> Rounded:
        part = slice(start, start + step)
        return _compare_rows(
            ggml.dequantize(rows[part], name, width),
            ggml.dequantize(exact[part], stored, width),
            name,
        )

    parts = list(pool.map(compare, range(0, len(rows), step)))
    if any(part.infinite for part in parts):
        return f"has {TOO_LARGE} for {name}"
    if num_wrong := sum(part.wrong for part in parts):
        return f"has {num_wrong} of {rows.shape[0] * width} weights off"
    if name in EXACT or name == "Q8_0":
        return None
    error = (
        sum(part.error for part in parts) / max(sum(part.size for part in parts), 1e-30)
    ) ** 0.5
    if not error <= _limit_error(8 * rows.shape[1] / width):
        return f"({name}) is {100 * error:.0f} % off"
    read = hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=quantize.DIGEST).hexdigest()
    return None if digests[tensor.name] == read else "is not what the quantiser made"


def _compare_rows(given: np.ndarray, exact: np.ndarray, name: str) -> Rounded:
    """Compare rows in float32 with the exact ones."""
    if name in EXACT:
        rounded = torch.tensor(exact).to(_TORCH[name]).float().numpy()
        return Rounded(int((given != rounded).sum()), infinite=not np.isfinite(given).all())
    error = np.abs(given - exact)
    if name != "Q8_0":
        return Rounded(0, float((error.astype(np.float64) ** 2).sum()), float((exact**2).sum()))
    largest = np.abs(exact).reshape(-1, BLOCK).max(1)
    # half a step; and the scale, a 127th of the largest, rounded to float16
    limit = largest / 254 * (1 + 2**-10) + np.maximum(largest * 2**-11, 127 * 2**-25)
    return Rounded(int((error.reshape(-1, BLOCK) > limit[:, None]).sum()))


_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _limit_error(bits: float) -> float:
    """Return the root mean square error, as a share of the weights' own, that a type of this many
    bits per weight may have.

    No code of so many bits is nearer to normal values than 2^-bits (Shannon's rate-distortion
    function). The tensors of SmolLM2-135M lie at 0.5 to 3.4 times that, in ten kinds from Q2_K to
    Q6_K; weights of heavier tails may take twice as much. Another tensor's weights are more than 1
    off.
    """
    return min(8 * 2.0**-bits, 0.9)
