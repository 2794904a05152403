"""The numbers that stand for the types of a GGUF file's values, as ggml/include/gguf.h has them."""

from __future__ import annotations

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""How `struct` reads the values of a type, each little-endian."""
UINT32, TEXT, ARRAY = 4, 8, 9
