"""Data sets: sources, readers, formats, encoding, selection and cache."""

__all__ = [
    "cache",
    "encode",
    "formats",
    "load",
    "prepare",
    "readers",
    "selection",
    "sources",
]
