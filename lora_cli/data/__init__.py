"""Data sets: sources, readers, formats, encoding, selection and cache."""

from lora_cli.data.encode import Renderer
from lora_cli.data.prepare import Prepared
from lora_cli.data.selection import Kept

__all__ = [
    "Kept",
    "Prepared",
    "Renderer",
    "cache",
    "formats",
    "load",
    "prepare",
    "readers",
    "selection",
    "sources",
]
