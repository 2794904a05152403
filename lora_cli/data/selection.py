"""Choose which encoded rows are trained on, and count what became of every row read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset
from pydantic import AfterValidator

from lora_cli.common import LoraError, spell_count, stored, ui
from lora_cli.data.encode import NOTHING, Encoded
from lora_cli.data.encoders import Encoder
from lora_cli.data.formats import BadRow
from lora_cli.data.offsets import NDArray
from lora_cli.models import IGNORED, PictureProcessor, Reader
from lora_cli.recipe import Data, Recipe

LISTED = 6
BATCH = 1000
"""Rows that are counted at a time."""
BEGINS_INSIDE = "dropped: an answer begins inside a token of the prompt"


class Kept(NamedTuple):
    """A row to train on, and where it was read."""

    place: str
    input_ids: NDArray
    labels: NDArray
    others: Mapping[str, NDArray] = NOTHING
    """Further columns of the row."""

    def read(self, column: str) -> NDArray:
        """Return one of its columns."""
        return self.others[column] if column in self.others else getattr(self, column)


def _refuse_negative(counted: Counter[Any]) -> Counter[Any]:
    if any(number < 0 for number in counted.values()):
        raise ValueError("a count below zero")
    return counted


Key = TypeVar("Key")
Tally = Annotated[Counter[Key], AfterValidator(_refuse_negative)]


@dataclass
class Counts:
    """What became of the rows read, counted as they pass."""

    read: stored.Count = 0
    kept: stored.Count = 0
    tokens: stored.Count = 0
    trained_tokens: stored.Count = 0
    left_out: Tally[str] = field(default_factory=Counter)
    """Rows dropped, cut, split or read otherwise than they are, by reason."""
    bad: Tally[str] = field(default_factory=Counter)
    """Rows that cannot be used, by kind."""
    first_bad: tuple[str, str, str] | None = None
    """The first of them: its place, what is wrong, and the hint."""
    by_turn: stored.Count = 0
    """Conversations that became one row for each answer."""
    windows: stored.Count = 0
    """How many more rows there are for long ones being read in windows."""
    control_in_text: stored.Count = 0
    """Rows whose author wrote control tokens in their text."""
    unread: Tally[str] = field(default_factory=Counter)
    """Rows with something that the chat template does not read, by its name."""
    unwanted: stored.Count = 0
    """Rows that say of their answer, which is learned, that it is not wanted."""
    lengths: Tally[stored.Count] = field(default_factory=Counter)
    """Lengths of all encoded rows, in tokens; of pairs, those of their sources."""
    target_lengths: Tally[stored.Count] = field(default_factory=Counter)
    """Those of the targets of pairs."""
    ends: Tally[stored.Count] = field(default_factory=Counter)
    """The last tokens of answers with loss, in rows that were not cut."""
    labels: Tally[stored.Count] = field(default_factory=Counter)
    """Numbers of the labels of rows, or of their tokens, where a model tells labels apart."""
    seen: Tally[str] = field(default_factory=Counter)
    """What pictures are, such as `PNG, RGB, 32x32`."""

    def add(self, other: Counts) -> Counts:
        """Return the sum of both; of the first bad rows, the earlier one."""
        sums = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, value in sums.items():
            if name != "first_bad":
                sums[name] = value + getattr(other, name)
        return Counts(**sums | {"first_bad": self.first_bad or other.first_bad})

    def count_bad(self, place: str, bad: BadRow) -> None:
        """Count one more row that cannot be used."""
        self.bad[bad.kind] += 1
        self.first_bad = self.first_bad or (place, bad.said, bad.hint)

    def list_reasons(self) -> str:
        """Return why rows were left out or cut: `429 dropped: over 512 tokens, 3 split at …`."""
        return ", ".join(f"{number} {reason}" for reason, number in self.left_out.items() if number)


class Limit(NamedTuple):
    """How long a text of a row may be."""

    column: str
    tokens: int
    key: str
    """The key that says so."""
    name: str = ""
    """What the text is called, where a row has several."""
    texts: int = 1
    """How many of these a row has in the column, one after another."""

    @property
    def total(self) -> int:
        """The most tokens in the column."""
        return self.tokens * self.texts


def list_limits(recipe: Recipe) -> list[Limit]:
    """Return the limits of a row's texts."""
    longest = recipe.training.max_length
    if recipe.objective_row.has_pairs:
        return [Limit("input_ids", longest, "training.max_length", "pair", texts=2)]
    if not recipe.task_row.has_targets:
        return [Limit("input_ids", longest, "training.max_length")]
    target = Limit("labels", recipe.max_target_length, "data.max_target_length", "target")
    return [Limit("input_ids", longest, "training.max_length", "source"), target]


def select_rows(
    encoded: Iterator[tuple[str, list[Encoded]]], recipe: Recipe, counts: Counts
) -> Iterator[Kept]:
    """Yield the rows to train on: those with something to learn, with long ones treated as
    data.on_long_row says."""
    limits = list_limits(recipe)
    for place, found in encoded:
        if recipe.task_row.writes_next_tokens:
            counts.by_turn += len(found) > 1
        else:
            counts.windows += max(0, len(found) - 1)
        for row in found:
            _count_lengths(recipe, row, counts)
            counts.control_in_text += row.control_in_text
            counts.unread.update(row.unread)
            counts.left_out.update(row.notes)
            if row.seen:
                counts.seen[row.seen] += 1
            learned = row.labels != IGNORED
            kept = Kept(place, row.input_ids, row.labels, row.others)
            over = [each for each in limits if len(kept.read(each.column)) > each.total]
            if reason := BEGINS_INSIDE if row.begins_inside else row.dropped:
                counts.left_out[reason] += 1
            elif not _teaches(recipe, row.labels):
                counts.left_out["dropped: nothing to learn"] += 1
            elif not over:
                _count_labels(recipe, row, learned, counts)
                yield _count_row(recipe, kept, learned, counts)
            else:
                for piece in _fit_row(recipe, kept, over[0], counts):
                    yield _count_row(recipe, piece, piece.labels != IGNORED, counts)


def _count_lengths(recipe: Recipe, row: Encoded, counts: Counts) -> None:
    """Count how long a row's texts were before they were cut."""
    counts.lengths[row.uncut or len(row.input_ids)] += 1
    if recipe.task_row.has_targets:
        counts.target_lengths[row.uncut_labels or len(row.labels)] += 1


def _count_labels(recipe: Recipe, row: Encoded, learned: NDArray, counts: Counts) -> None:
    """Count what a row's labels are by themselves: the ends of answers, or what is told apart."""
    task = recipe.task_row
    if task.writes_text:
        # an answer's last token has a label, and the next one does not
        last = np.flatnonzero(learned & ~np.append(learned[1:], False))
        counts.ends.update(row.labels[last].tolist())
    elif task.counts_labels:
        counts.left_out[f"cut at {recipe.training.max_length} tokens"] += bool(row.uncut)
        counts.labels.update(_list_labels(recipe, row.labels))


def _list_labels(recipe: Recipe, labels: NDArray) -> list[int]:
    """Return the numbers of a row's labels, where a model tells labels apart."""
    if recipe.model.problem_type == "multi_label_classification":
        return np.flatnonzero(labels).tolist()
    return [] if recipe.model.problem_type == "regression" else labels[labels != IGNORED].tolist()


def _count_row(recipe: Recipe, row: Kept, learned: NDArray, counts: Counts) -> Kept:
    """Return the row, counted as kept."""
    counts.kept += 1
    counts.tokens += sum(len(row.read(column)) for column in recipe.task_row.text_columns)
    counts.trained_tokens += int(learned.sum())
    return row


def recount(counts: Counts, rows: Dataset, recipe: Recipe) -> Counts:
    """Return the counts of some of the rows that `counts` are of: their tokens and labels; what was
    read is that of all."""
    tokens = trained = 0
    labels = Counter[int]()
    for batch in rows.with_format("arrow").iter(BATCH):
        for column in recipe.task_row.text_columns:
            texts = column in batch.column_names  # a picture counts as one
            tokens += len(batch[column].combine_chunks().flatten()) if texts else len(batch)
        learned = batch["labels"].combine_chunks().flatten().to_numpy()
        trained += int((learned != IGNORED).sum())
        if recipe.task_row.counts_labels:
            each = batch["labels"].to_numpy(zero_copy_only=False)
            labels.update(chain.from_iterable(_list_labels(recipe, one) for one in each))
    return replace(
        counts,
        kept=len(rows),
        tokens=tokens,
        trained_tokens=trained,
        left_out=Counter(counts.left_out),
        labels=labels,
    )


def _teaches(recipe: Recipe, labels: NDArray) -> bool:
    """Return whether there is something to learn by a row's labels: where tokens are foretold from
    those before, the first is foretold from none."""
    own = labels[1:] if recipe.task_row.writes_next_tokens else labels
    return bool((own != IGNORED).any())


def _fit_row(recipe: Recipe, row: Kept, over: Limit, counts: Counts) -> list[Kept]:
    """Return what is left of a row that is too long, with something to learn in each piece."""
    limit, length, policy = over.tokens, len(row.read(over.column)), recipe.data.on_long_row
    which = f"the {over.name} has " if over.name else ""
    if policy == "error":
        raise LoraError(
            f"{row.place}: {which}{spell_count(length, 'token')}, over {over.key} {limit}",
            f"--set {over.key}={length}, or --set data.on_long_row=drop",
        )
    if policy == "drop":
        counts.left_out[f"dropped: {over.name}{' ' * bool(over.name)}over {limit} tokens"] += 1
        return []
    starts = range(0, length if policy == "split" else 1, limit)
    pieces = [
        row._replace(
            input_ids=row.input_ids[start : start + limit],
            labels=row.labels[start : start + limit],
        )
        for start in starts
    ]
    taught = [piece for piece in pieces if _teaches(recipe, piece.labels)]
    if not taught:
        counts.left_out["dropped: the whole answer was cut off"] += 1
    elif policy == "split":
        counts.left_out[f"split at {limit} tokens"] += 1
    else:
        counts.left_out[f"cut at {limit} tokens"] += 1
    return taught


def refuse_bad_rows(data: Data, counts: Counts) -> None:
    """Raise LoraError for the first bad row, with how many of each kind there are, unless bad rows
    are skipped."""
    total = sum(counts.bad.values())
    if counts.first_bad is None or data.on_bad_row == "skip":
        counts.left_out["dropped: bad"] += total
        return
    place, said, hint = counts.first_bad
    more = (
        f" ({total} of {spell_count(counts.read, 'row')} {'is' if total == 1 else 'are'} bad: "
        f"{_list_kinds(counts)})"
        if total > 1
        else ""
    )
    raise LoraError(f"{place}: {said}{more}", hint)


def _list_kinds(counts: Counts) -> str:
    """Return the kinds of bad rows with their numbers, the most frequent first."""
    return ", ".join(f"{number} × {kind}" for kind, number in counts.bad.most_common())


def refuse_nothing(counts: Counts) -> None:
    """Raise LoraError where no row is left to learn from, or where most answers begin inside a
    token."""
    inside = counts.left_out[BEGINS_INSIDE]
    if 2 * inside > counts.read:
        raise LoraError(
            f"the chat template's generation prompt ends in the middle of a token in {inside} of "
            f"{spell_count(counts.read, 'row')}: "
            "inference would feed other tokens than training",
            "mend the template (a space at its end?), or --set model.chat_template=chatml",
        )
    if not counts.kept:
        reasons = [reason for reason, number in counts.left_out.items() if number]
        too_long = any("tokens" in reason or "cut off" in reason for reason in reasons)
        if too_long and any("target over" in reason for reason in reasons):
            hint = f"--set data.max_target_length={max(counts.target_lengths)}"
        elif too_long:
            hint = f"--set training.max_length={max(counts.lengths)}"
        elif counts.first_bad:
            place, said, _ = counts.first_bad
            hint = f"look at the first bad row, {place}: {said}"
        else:
            hint = "look at the rows"
        raise LoraError(
            f"no rows are left to train on: {counts.read} read ({counts.list_reasons()})", hint
        )


def find_stop_ids(tokenizer: Reader, counts: Counts) -> list[int]:
    """Return the control tokens that trained answers end with, at which generation is to stop."""
    if isinstance(tokenizer, PictureProcessor):
        return []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(
        token for token in counts.ends if token in special or token in tokenizer.all_special_ids
    )


def warn_of_counts(encoder: Encoder, counts: Counts) -> None:
    """Warn of what is not an error, but worth knowing before a run."""
    if counts.first_bad:
        place, said, _ = counts.first_bad
        total = sum(counts.bad.values())
        bad, are = spell_count(total, "bad row"), "is" if total == 1 else "are"
        ui.warn(
            f"{bad} of {counts.read} {are} left out ({_list_kinds(counts)}); the first is "
            f"{place}: {said}"
        )
    _warn_of_labels(encoder, counts)
    if counts.control_in_text:
        rows = spell_count(counts.control_in_text, "row has", "rows have")
        ui.warn(f"{rows} control tokens in their text; they are encoded as control tokens")
    for name, number in counts.unread.items():
        rows = spell_count(number, "row has", "rows have")
        ui.warn(f"{rows} {name}, which the chat template does not read: it is left out")
    if counts.unwanted:
        rows = spell_count(counts.unwanted, "row says", "rows say")
        ui.warn(
            f"{rows} that the answer is not wanted, and it is learned like any other: "
            "--set objective=kto learns from such rows what to avoid"
        )
    if counts.by_turn:
        ui.say(
            f"  {spell_count(counts.by_turn, 'conversation')} became one row for each answer: the "
            "template changes earlier turns"
        )


def _warn_of_labels(encoder: Encoder, counts: Counts) -> None:
    """Warn of answers that end without a token that stops them, and of labels without a row."""
    stops = set(find_stop_ids(encoder.tokenizer, counts))
    endless = sum(number for token, number in counts.ends.items() if token not in stops)
    if endless:
        do = "does" if endless == 1 else "do"
        ui.warn(
            f"{endless} of {spell_count(counts.ends.total(), 'answer')} {do} not end with a stop "
            "token: the model may never stop"
        )
    absent = [name for at, name in enumerate(encoder.names) if not counts.labels[at]]
    if counts.labels and absent:
        listed = ", ".join(absent[:LISTED]) + (" and more" if len(absent) > LISTED else "")
        labels, are = spell_count(len(encoder.names), "label"), "is" if len(absent) == 1 else "are"
        ui.warn(f"{len(absent)} of {labels} {are} in no row: {listed}")
