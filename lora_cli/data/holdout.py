"""Hold rows out of training, to evaluate on: `data.eval_fraction` and `data.eval_rows`.

What a row says decides, not where it stands or what its columns are called: rows that say the same
are on one side, in several files or parts of a mix too, and with `eval_fraction` a row stays on its
side when others are added. A conversation that became several rows is held out whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from lora_cli.common import UsageError, spell_count
from lora_cli.data import cache, selection
from lora_cli.data.digests import DIGEST, LARGEST
from lora_cli.data.offsets import NDArray
from lora_cli.data.prepare import Prepared
from lora_cli.recipe import Recipe


class Sides(NamedTuple):
    """The parts of a data set, or a mix, in two."""

    train: list[Prepared]
    """Each part without the rows that are held out of it."""
    held: list[Prepared]
    """These; each as often as it is there, whatever the part weighs."""


def split(parts: Sequence[Prepared], recipe: Recipe) -> Sides:
    """Return the parts without the rows that are held out, and those.

    Of streams, they are held out of the first rows, and left out wherever they come again.
    Raises UsageError where that leaves nothing on one of the sides.
    """
    digests, bound = _draw_line(parts, recipe)
    chosen = [each < bound for each in digests]
    held = [_take(part, rows, recipe) for part, rows in zip(parts, chosen)]
    rest = [_take(part, ~rows, recipe) for part, rows in zip(parts, chosen)]
    for part, rows in zip(rest, chosen):
        part.counts.left_out["held out to evaluate"] += int(rows.sum())
    unseen = frozenset(np.concatenate([each[rows] for each, rows in zip(digests, chosen)]).tolist())
    train = [_leave_out(part, unseen) for part in rest]
    return Sides(train, [each._replace(stream=None) for each in held])


def find_held(parts: Sequence[Prepared], recipe: Recipe) -> frozenset[int]:
    """Return the digests of the rows that `split` holds out."""
    digests, bound = _draw_line(parts, recipe)
    return frozenset(np.concatenate([each[each < bound] for each in digests]).tolist())


def _draw_line(parts: Sequence[Prepared], recipe: Recipe) -> tuple[list[NDArray], int]:
    """Return the digests of each part's rows, and the number below which one is held out."""
    digests = [_read_digests(part.rows) for part in parts]
    return digests, _find_bound(np.concatenate(digests), recipe)


def _read_digests(rows: Dataset) -> NDArray:
    """Return the digest of each row, int64."""
    parts = rows.with_format("arrow").select_columns([DIGEST]).iter(cache.BATCH)
    found = [part[DIGEST].combine_chunks().flatten().to_numpy() for part in parts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _find_bound(digests: NDArray, recipe: Recipe) -> int:
    """Return the number below which a digest is held out."""
    data = recipe.data
    different = np.unique(digests)
    key = "data.eval_rows" if data.eval_rows is not None else "data.eval_fraction"
    if len(different) < 2:
        raise UsageError(
            f"{key}: all rows say the same: none can be held out and the others trained on",
            f"give data.path more rows, or data.eval_path others, and leave {key} out",
        )
    if data.eval_rows is not None:
        if len(different) <= data.eval_rows:
            raise UsageError(
                f"data.eval_rows: {data.eval_rows} of "
                f"{spell_count(len(different), 'different row')} would leave "
                "none to train on",
                f"--set data.eval_rows={max(1, len(different) // 10)}",
            )
        return int(different[data.eval_rows])
    assert data.eval_fraction is not None
    bound = int(data.eval_fraction * LARGEST)
    held = int((different < bound).sum())
    if held in (0, len(different)):
        left = "none out" if held == 0 else "all of them out"
        raise UsageError(
            f"data.eval_fraction: {data.eval_fraction:g} of "
            f"{spell_count(len(different), 'different row')} holds "
            f"{left}",
            f"--set data.eval_fraction=null --set data.eval_rows={max(1, len(different) // 10)}",
        )
    return bound


def _take(part: Prepared, chosen: NDArray, recipe: Recipe) -> Prepared:
    """Return the chosen rows of a part, counted anew, without their digests."""
    rows = part.rows.select(np.flatnonzero(chosen)).remove_columns(DIGEST)
    first = [row for row, is_chosen in zip(part.first, chosen) if is_chosen]
    counts = selection.recount(part.counts, rows, recipe)
    which = hashlib.sha256(f"{part.fingerprint} ".encode() + np.packbits(chosen).tobytes())
    return part._replace(rows=rows, first=first, counts=counts, fingerprint=which.hexdigest()[:32])


def _leave_out(part: Prepared, unseen: frozenset[int]) -> Prepared:
    """Return a part whose stream, if it is one, gives no row that is held out."""
    if part.stream is None:
        return part

    def is_outside(digest: list[int]) -> bool:
        return digest[0] not in unseen

    outside = part.stream.filter(is_outside, input_columns=[DIGEST])
    return part._replace(stream=outside.remove_columns(DIGEST))
