"""Data sets: from files, a folder or the hub to token ids with labels, prepared once and kept, or
streamed.

Its doors, in the order a reader needs them:

    load        the rows a recipe trains on and evaluates on; mixes by weight
    sources     where rows come from; how each data set is opened
    formats     what a row may be, and how its columns tell
    Renderer    conversations and texts as token ids with labels
    selection   which encoded rows are trained on; long rows and bad ones
    Kept        a row to train on, with the place it was read at
    prepare     one data set from its source to its rows
    Prepared    its rows, counts and fingerprint
    cache       prepared rows on the disk
"""

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
    "selection",
    "sources",
]
