"""Shares of a unit's instances, where ranks that hold the same encoder have some of them each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=4096)
def shares(tokens: Sequence[int], ranks: int) -> tuple[tuple[int, int], ...]:
    """(first, count) of each rank's instances, which become so many ``tokens`` each: consecutive ones, so that the most
    tokens of a share are as few as can be. Of fewer instances than ranks, the last ranks have none."""
    if not tokens:
        return ((0, 0),) * ranks
    least, most = max(max(tokens), -(-sum(tokens) // ranks)), sum(tokens)
    found = _filled(tokens, ranks, most)
    while least < most:
        middle = (least + most) // 2
        tried = _filled(tokens, ranks, middle)
        if tried:
            # What the fullest share of these holds bounds the next try more closely than the limit did.
            most, found = max(sum(tokens[first : first + count]) for first, count in tried), tried
        else:
            least = middle + 1
    return found


def _filled(tokens: Sequence[int], ranks: int, limit: int) -> tuple[tuple[int, int], ...]:
    """Shares of at most ``limit`` tokens, one filled after the other; nothing if that takes more ranks."""
    slices, first, held = [], 0, 0
    for i, own in enumerate(tokens):
        if held + own > limit:
            slices.append((first, i - first))
            first, held = i, 0
        held += own
    slices.append((first, len(tokens) - first))
    if len(slices) > ranks:
        return ()
    return tuple(slices) + ((len(tokens), 0),) * (ranks - len(slices))
