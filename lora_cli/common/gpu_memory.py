"""How torch's allocator asks a GPU for memory; said before torch is loaded, which reads it then."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables by which a user says how; torch 2.13 reads the first before the others."""
GROWING = "expandable_segments:True"
NVIDIA = Path("/dev/nvidiactl")
"""What NVIDIA's driver puts there on Linux, also in containers; Windows' Linux has no such file,
and the allocator of AMD's builds of torch has no such segments."""


def let_segments_grow() -> None:
    """Let torch's allocator on an NVIDIA GPU extend what it has instead of adding pieces, unless
    the user has said how it works.

    The rows of each training step make sequences of another length; what is freed of one does not
    fit the next, and the card fills with pieces too small to use.
    """
    if sys.platform == "linux" and NVIDIA.exists() and not any(map(os.environ.get, SETTINGS)):
        os.environ[SETTINGS[0]] = GROWING
