"""Who of several processes gets which rows of a batch. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapreplace


def deal(lengths: Sequence[int], world: int, padded: bool) -> list[list[int]]:
    """Return the places of rows of these lengths for each of `world` processes, each in order.

    The longest are dealt first, to whoever has the fewest tokens. Where rows are `padded` to the
    longest of their share, those of about the same length stay together, the fewer the longer they
    are, so that no share has more tokens than need be; it has never more than shares of equally
    many rows would have.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    if padded:
        dealt = _cut(longest_first, lengths, world)
    else:
        dealt = [[] for _ in range(world)]
        waiting = [(0, rank) for rank in range(world)]
        for place in longest_first:
            tokens, rank = waiting[0]
            dealt[rank].append(place)
            heapreplace(waiting, (tokens + lengths[place], rank))
    return [sorted(share) for share in dealt]


def _cut(longest_first: list[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Cut rows into `world` shares whose padded tokens are at most as few as possible."""
    if not longest_first:
        return [[] for _ in range(world)]

    def cut(budget: int) -> list[list[int]]:
        found, start = [], 0
        while start < len(longest_first):
            end = start + budget // lengths[longest_first[start]]
            found.append(longest_first[start:end])
            start = end
        return found

    longest = lengths[longest_first[0]]
    most = longest * -(-len(longest_first) // world)
    budgets = range(longest, most + 1)
    found = cut(budgets[bisect_left(budgets, True, key=lambda budget: len(cut(budget)) <= world)])
    return found + [[] for _ in range(world - len(found))]
