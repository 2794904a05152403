"""Check for room on the disk before a run starts, and say how much was missing where it ran out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import LoraError
from lora_cli.recipe import Recipe
from lora_cli.train import checkpoints, receipt

TOKEN = 150
"""About as many bytes does tokenizer.json take for a token."""
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = (
    "No space left",
    "os error 28",
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)


class Need(NamedTuple):
    """About as many bytes as a run needs on the disk."""

    adapter: int
    checkpoint: int
    kept: int
    """The most checkpoints that are there at once."""
    parent: int = 0
    """The copy of the adapter that the run trains on."""

    @property
    def total(self) -> int:
        return self.parent + self.adapter + self.kept * self.checkpoint


def estimate_need(recipe: Recipe, trained: int, tokens: int, steps: int) -> Need:
    """Return what a run of `steps` steps writes that trains `trained` parameters, for `tokens`
    tokens."""
    training = recipe.training
    per_parameter = (
        2 if "8bit" in training.optim else 4 if training.optim in ("sgd", "lion_32bit") else 8
    )
    adapter = 4 * trained + TOKEN * tokens + 2**20
    checkpoint = adapter + (0 if training.save_only_model else per_parameter * trained)
    given = training.collect_values()
    every = float(given.get("save_steps") or 500)
    every = every if every >= 1 else max(1.0, every * steps)
    strategy = str(given.get("save_strategy") or "steps")
    saves = {"no": 0, "steps": int(steps // every) + 1}.get(strategy, steps)
    if training.save_total_limit is not None:
        saves = min(
            saves, training.save_total_limit + 1
        )  # the oldest goes after the newest is there
    saves += training.keep == "best"  # which goes when there is a better one
    parent = 0 if recipe.model.adapter is None else adapter
    return Need(adapter, checkpoint, saves, parent)


def refuse_too_little(folder: Path, needed: Need) -> None:
    """Raise LoraError where the disk of the run's folder, which need not be there, lacks room for
    what is not written yet."""
    written = sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    missing = needed.total - written - free
    if missing > 0:
        raise LoraError(
            f"the disk is too small: the run needs about {_format_mb(needed.total)} MB in {folder} "
            f"({needed.kept} checkpoints of {_format_mb(needed.checkpoint)} MB and the adapter), "
            f"{_format_mb(free)} MB are free, {_format_mb(missing)} MB are missing",
            "make room, --set training.save_total_limit=1, or --set output_dir=… on another disk",
        )


@contextmanager
def translate_full_disk(folder: Path, needed: Need) -> Iterator[None]:
    """Turn what fails inside for a full disk into one LoraError with the missing megabytes."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        saved = [path.parent for path in folder.glob(f"checkpoint-*/{checkpoints.MANIFEST}")]
        sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in saved]
        size = max([needed.checkpoint, *sizes])
        free = shutil.disk_usage(folder).free
        raise LoraError(
            f"the disk is full: the next {_format_mb(size)} MB do not fit in {folder}, "
            f"{_format_mb(free)} MB are free, {_format_mb(max(1, size - free))} MB are missing; "
            "what was saved before is whole",
            f"make room, then: {receipt.write_resumption(folder)}",
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
            return True
        if any(word in str(error) for word in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _format_mb(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
