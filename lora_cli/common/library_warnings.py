"""Hear what the libraries warn of: each warning becomes one line of ours, said once, unless it is
listed here with the reason why it tells a user nothing.

Elsewhere silenced: what PEFT says of adapters (`models/attach.py`, each with its reason), the
traceback that torch logs of a rehearsal that fails (`plan/rehearsal.py`, which says so itself), a
question of `lora doctor` (`doctor/checks.py`), llama.cpp's log (`gguf/engine.py`, repeated aloud
where it fails), progress bars and the converter's own lines (we draw one of ours).
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from lora_cli.common import ui

SILENCED = {
    "Failed to load CPU gemm_4bit": "an optional kernel, which lora turns off (four_bit.py)",
    "The new (embeddings|lm_head weights) will be initialized": "new rows are trained, or an "
    "adapter's",
    "The tokenizer has new PAD/BOS/EOS": "of the base's settings, which no adapter holds",
    "loss_type=None": "the default that is taken is the one that is meant",
    "Using Rank-Stabilized LoRA with": "models/init_weights.py restores the base's weights itself",
    "LOAD REPORT": "Base.load refuses weights that do not fit",
    "CUDA initialization: ": "gpu_faults.py says it with what to type",
    "Found GPU.* compute capability": "the same",
    "with CUDA capability sm_.* is not compatible": "the same",
    "Token indices sequence length is longer": "plan/sizes.py refuses or says it of rows",
}
"""The beginning of a warning, or what tells it, as a regular expression: why it is not shown."""
_heard: set[str] = set()


class _Handler(logging.Handler):
    """Hears the loggers of the libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # values that do not fit: logging ends nothing
            text = str(record.msg)
        _hear(record.name.partition(".")[0], text)


_handler = _Handler(logging.WARNING)


_own_emit = logging.StreamHandler.emit


def _emit(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
    """Write a record as its handler does, but to the screen as one line of ours: datasets and
    accelerate have handlers of their own."""
    if handler.stream not in (sys.stdout, sys.stderr):
        _own_emit(handler, record)
    elif record.levelno >= logging.WARNING:
        _handler.emit(record)


def listen() -> None:
    """Hear every logger and `warnings.warn` from now on."""
    _heard.clear()
    logging.StreamHandler.emit = _emit  # type: ignore[assignment,method-assign]
    # deprecations speak to those who call: lora, not its user
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show
    logging.getLogger().addHandler(_handler)


def listen_to_transformers() -> None:
    """Hear transformers, whose logger keeps to itself."""
    from transformers.utils import logging as theirs

    theirs.disable_default_handler()
    theirs.set_verbosity_warning()
    theirs.add_handler(_handler)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Do what `warnings.showwarning` does, as one line."""
    parts = Path(filename).parts
    inside = parts.index("site-packages") + 1 if "site-packages" in parts[:-1] else -1
    _hear(Path(parts[inside]).stem if parts else category.__name__, str(message))


def _hear(library: str, text: str) -> None:
    """Say a warning of a library, once."""
    said = " ".join(text.split())
    if said in _heard or any(re.search(each, said) for each in SILENCED):
        return
    _heard.add(said)
    ui.warn(f"{library}: {said}")
