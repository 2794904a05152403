"""Look at the rows of a data set: how many, how long, which are bad, which are there twice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lora_cli.common import LoraError, quote
from lora_cli.data import (
    encoders,
    formats,
    preferences,
    prepare,
    readers,
    selection,
    sources,
    unpaired,
)
from lora_cli.recipe import Data, Recipe

BATCH = 1000
MEASURED = 20_000
"""Rows, from the first, that are tokenised to learn how long they are."""
MOST = 1_000_000
"""Rows that are looked at."""
SHOWN = 3
"""Bad rows that are listed, for each thing that is wrong."""


@dataclass
class Seen:
    """What the rows of a data set are."""

    count: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong with some, each with the first rows of which it is, as `place: what`."""
    num_bad: int = 0
    first_bad: tuple[str, formats.BadRow] | None = None
    """The first of them, with its place."""
    first_repeated: tuple[str, str] | None = None
    """The places of the first row that says the same as an earlier one, and of that."""
    num_repeated: int = 0
    first_unwanted: tuple[str, str] | None = None
    """The place of the first row whose label is false, and the column that says it."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Of rows that were measured, in tokens; of pairs, those of their sources."""
    target_lengths: Counter[int] = field(default_factory=Counter)
    digests: dict[bytes, str] = field(default_factory=dict)
    """Of what each row says, with its place."""
    counts: selection.Counts = field(default_factory=selection.Counts)
    """What becomes of the measured rows when they are prepared."""

    @property
    def usable(self) -> int:
        """Rows that can be trained on."""
        return self.count - self.num_bad

    @property
    def different(self) -> int:
        """Rows among them that no earlier one says."""
        return self.usable - self.num_repeated

    def add_bad(self, place: str, bad: formats.BadRow) -> None:
        """Count a row that cannot be used."""
        self.num_bad += 1
        self.first_bad = self.first_bad or (place, bad)
        listed = self.bad.setdefault(bad.kind, [])
        if len(listed) < SHOWN:
            listed.append(f"{place}: {bad.said}")

    def add_good(self, place: str, row: Any) -> None:
        """Count a row that can be used, as a converter has made it."""
        said = json.dumps(row, sort_keys=True, default=repr).encode()
        key = hashlib.blake2b(said, digest_size=12).digest()
        if key in self.digests:
            self.num_repeated += 1
            self.first_repeated = self.first_repeated or (place, self.digests[key])
        else:
            self.digests[key] = place if len(self.digests) < MEASURED else "an earlier row"

    def add_label(self, place: str, row: dict[str, Any]) -> None:
        """Note a row that says that its answer is not wanted."""
        if self.first_unwanted is None and unpaired.read_label(row) is False:
            self.first_unwanted = place, str(unpaired.find_label(row))

    def add_encoded(self, place: str, found: list[Any] | formats.BadRow) -> None:
        """Count the lengths of what a row became."""
        if isinstance(found, formats.BadRow):
            self.add_bad(place, found)
            return
        for each in found:
            parts = each.others.get(preferences.DOCUMENTS)
            longest = len(each.input_ids) if parts is None else int(parts.max())
            self.lengths[each.uncut or longest] += 1
            self.target_lengths[each.uncut_labels or len(each.labels)] += 1


def read_first(data: Data) -> tuple[sources.Source, list[dict[str, Any]]]:
    """Return where the rows come from, and the first of them that can be read. Raises LoraError
    where there is none."""
    assert data.path is not None
    source = sources.find_source(data, "path", data.path, data.split)
    first: list[dict[str, Any]] = []
    bad: formats.BadRow | None = None
    where = source.name
    for place, row in islice(source.read_rows(), prepare.LOOKED_AT):
        if isinstance(row, formats.BadRow):
            where, bad = (where, bad) if bad else (place, row)
            continue
        first.append(row)
        if len(first) == prepare.COLUMNS_FROM:
            break
    if not first:
        if bad is None:
            raise LoraError(f"{source.name} holds no rows", f"head {quote(source.name)}")
        hint = suggest_look(where) if bad.hint == formats.MEND else bad.hint
        raise LoraError(f"{where}: {bad.said}", hint)
    return source, first


def suggest_look(place: str) -> str:
    """Return the hint for rows that are to be mended, with the command that shows the first."""
    show = place.suggest_command() if isinstance(place, readers.Place) else None
    return f"mend such rows; {show} shows the first" if show else "mend such rows"


def look(
    source: sources.Source,
    recipe: Recipe,
    encoder: encoders.Encoder,
    style: str,
    names: dict[str, str],
) -> Seen:
    """Return what the rows are. Those that cannot be used are counted, and end nothing."""
    seen = Seen()
    convert = encoder.find_converter(style)
    most = min(recipe.data.max_rows or MOST, MOST)
    rows = islice(source.read_rows(), most)
    batches = _convert(rows, convert, names, seen)
    kept = recipe.data.model_copy(update={"on_long_row": "drop"})  # no length is too much yet
    recipe = recipe.model_copy(update={"data": kept})
    for batch, made in encoder.encode(islice(batches, MEASURED // BATCH)):
        for (place, _), found in zip(batch, made):
            seen.add_encoded(place, found)
            if not isinstance(found, formats.BadRow):
                deque(selection.select_rows(iter([(place, found)]), recipe, seen.counts), maxlen=0)
    for _ in batches:
        pass
    return seen


def _convert(
    rows: Iterator[tuple[str, readers.Row]],
    convert: formats.Converter,
    names: dict[str, str],
    seen: Seen,
) -> Iterator[list[tuple[str, Any]]]:
    """Yield the rows that can be used in batches, as an encoder takes them, and count all."""
    while some := list(islice(rows, BATCH)):
        batch = []
        for place, row in some:
            seen.count += 1
            try:
                if isinstance(row, formats.BadRow):
                    raise row
                seen.add_label(place, row)
                made = convert(formats.rename_columns(row, names) if names else row)
            except formats.BadRow as bad:
                seen.add_bad(place, bad)
                continue
            seen.add_good(place, made)
            batch.append((place, made))
        if batch:
            yield batch


def list_quantiles(lengths: Counter[int]) -> list[int]:
    """Return up to how many tokens half of the rows have, 95 % and all."""
    shares, found, below = [0.5, 0.95, 1.0], list[int](), 0
    for length, number in sorted(lengths.items()):
        below += number
        while shares and below >= shares[0] * lengths.total():
            shares.pop(0)
            found.append(length)
    return found
