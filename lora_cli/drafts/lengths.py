"""How long rows may be: as long as they are, where the base reads that."""

from __future__ import annotations

from collections import Counter

from lora_cli.common import spell_count, ui
from lora_cli.drafts import rows as rows_of
from lora_cli.drafts.draft import Draft
from lora_cli.drafts.rows import Seen
from lora_cli.models import Base, find_positions
from lora_cli.recipe import Task

LENGTH, TARGET, POLICY = "training.max_length", "data.max_target_length", "data.on_long_row"
ROUND = 64
"""What lengths are a multiple of, where there is room."""
LONGEST = 8192
"""Tokens of a row that is kept whole."""
PASSAGE = 1024
"""Tokens of the pieces that plain texts are cut into."""
WINDOW = 384
"""Tokens of a question with a window over its text, as for SQuAD."""
CUT = 512
"""Tokens of a text that is told apart, tagged or made into another one, over which it is cut."""


def put_limits(draft: Draft, base: Base) -> None:
    """Put limits into the draft that cut no row, to look at rows by."""
    if base.task.reads_pictures:
        return
    draft.put(LENGTH, _find_most(base, WINDOW if _reads_windows(base.task) else LONGEST))
    if base.task.has_targets:
        draft.put(TARGET, _find_most(base, LONGEST))


def _reads_windows(task: Task) -> bool:
    """Return whether a long text is read in windows."""
    return not task.writes_next_tokens and task.long_rows[0] == "split"


def _find_most(base: Base, wanted: int) -> int:
    """Return the most tokens that are wanted and the base reads."""
    positions = find_positions(base)
    return min(wanted, positions.number) if positions else wanted


def settle_length(draft: Draft, seen: Seen, style: str, base: Base) -> None:
    """Put the longest row into the draft, and what becomes of longer ones."""
    task = base.task
    if task.reads_pictures:
        return
    half, most, longest = (*rows_of.list_quantiles(seen.lengths), 0, 0, 0)[:3]
    part = f" of the first {rows_of.MEASURED:,}" if seen.usable > rows_of.MEASURED else ""
    what = "sources" if task.has_targets else "rows"
    ui.say(
        f"  lengths: half of the {what}{part} have up to {spell_count(half, 'token')}, 95% "
        f"{most}, all {longest}"
    )
    if task.writes_next_tokens:
        limit = _find_most(base, PASSAGE if style == "text" else LONGEST)
        _put_limit(draft, LENGTH, seen.lengths, limit)
        if style == "text" and longest > draft.read(LENGTH):
            draft.put(POLICY, "split", "a longer text is cut into several")
    elif _reads_windows(task):
        draft.put(LENGTH, draft.read(LENGTH), "a question with a window over its text")
    else:
        _put_limit(draft, LENGTH, seen.lengths, _find_most(base, CUT))
        if task.has_targets:
            _put_limit(draft, TARGET, seen.target_lengths, _find_most(base, CUT))
        draft.put(POLICY, "truncate", "a longer one is cut")


def _put_limit(draft: Draft, key: str, lengths: Counter[int], limit: int) -> None:
    """Put the smallest length into the draft that all rows have, but no more than the limit."""
    longest = max(lengths)
    length = min(-(-longest // ROUND) * ROUND, limit)
    over = sum(number for each, number in lengths.items() if each > length)
    note = f"tokens; the longest row has {longest:,}"
    draft.put(
        key,
        max(length, 2),
        f"{note}; {spell_count(format(over, ','), 'row is', 'rows are')} longer" if over else note,
    )
    if over and not draft.is_given(key):
        ui.say(
            f"  {spell_count(format(over, ','), 'row is', 'rows are')} longer than "
            f"{spell_count(format(length, ','), 'token')} ({key})"
        )
