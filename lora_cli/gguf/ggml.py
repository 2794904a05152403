"""ggml's types, its quantiser and its way back, by ctypes from xllamacpp's library (the `gguf`
extra)."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import numpy as np

from lora_cli.common import LoraError
from lora_cli.gguf import opening

EXACT = ("F32", "F16", "BF16")
"""Types that hold numbers one by one: what is quantised from."""


class Ggml:
    """ggml's types and its quantiser, by ctypes. Raises LoraError where xllamacpp is not installed
    or hides them."""

    def __init__(self) -> None:
        types = opening.import_xllamacpp().ggml_type
        known = [each for each in types if each != types.GGML_TYPE_COUNT]
        self.numbers = {each.name.removeprefix("GGML_TYPE_"): int(each) for each in known}
        self.names = {number: name for name, number in self.numbers.items()}
        self.lib = load_library()
        whole, place, size = ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
        try:
            arguments = [ctypes.c_int, place, place, whole, whole, whole, place]
            self.lib.ggml_quantize_chunk.argtypes = arguments
            self.lib.ggml_quantize_chunk.restype = size
            self.lib.ggml_row_size.argtypes = [ctypes.c_int, whole]
            self.lib.ggml_row_size.restype = size
            self.lib.ggml_validate_row_data.argtypes = [ctypes.c_int, place, size]
            self.lib.ggml_validate_row_data.restype = ctypes.c_bool
            self.lib.ggml_blck_size.restype = whole
        except AttributeError as error:
            said = f"this xllamacpp does not let others use ggml's quantiser ({error})"
            raise LoraError(
                said, "pip install -U xllamacpp; -q q8_0, f16, bf16 and f32 need no quantiser"
            ) from error
        self.block = {
            name: int(self.lib.ggml_blck_size(number)) for name, number in self.numbers.items()
        }

    def num_bytes(self, type_name: str, shape: tuple[int, ...]) -> int:
        """Return the size of a tensor of this type and shape (innermost first)."""
        return math.prod(shape[1:]) * self.lib.ggml_row_size(self.numbers[type_name], shape[0])

    def quantize(self, rows: np.ndarray, type_name: str, weights: np.ndarray | None) -> np.ndarray:
        """float32 `rows` (number, width) in blocks of `type_name`, as bytes; `weights`: one for
        each column."""
        rows, made = (
            np.ascontiguousarray(rows),
            np.empty(self.num_bytes(type_name, rows.shape[::-1]), np.uint8),
        )
        columns = None if weights is None else np.ascontiguousarray(weights, np.float32)
        address = None if columns is None else columns.ctypes.data
        self.lib.ggml_quantize_chunk(
            self.numbers[type_name], rows.ctypes.data, made.ctypes.data, 0, *rows.shape, address
        )
        return made

    def is_valid(self, data: np.ndarray, type_name: str) -> bool:
        """Whether every number in `data`, bytes of `type_name`, is finite."""
        return self.lib.ggml_validate_row_data(
            self.numbers[type_name], data.ctypes.data, data.nbytes
        )

    def dequantize(self, data: np.ndarray, type_name: str, width: int) -> np.ndarray:
        """Return the numbers that `data`, bytes of `type_name`, stands for: float32 (rows,
        width)."""
        rows = data.reshape(-1, self.num_bytes(type_name, (width, 1)))
        if type_name == "BF16":
            return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if type_name in EXACT:
            return rows.view("<f2" if type_name == "F16" else "<f4").astype(np.float32, copy=False)
        rows, made = np.ascontiguousarray(rows), np.empty((len(rows), width), np.float32)
        convert = getattr(self.lib, f"dequantize_row_{_spell(type_name)}")
        convert.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        convert.restype = None
        convert(rows.ctypes.data, made.ctypes.data, made.size)
        return made


def _spell(type_name: str) -> str:
    """Spell a type as ggml's functions do: q4_0, but q4_K."""
    return type_name[:-1].lower() + "K" if type_name.endswith("_K") else type_name.lower()


def load_library() -> Any:
    """Load the library of xllamacpp, whose C names are llama.cpp's and ggml's. Raises LoraError
    where it is not installed."""
    opening.import_xllamacpp()
    return ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__)
