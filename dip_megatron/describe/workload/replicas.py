"""Which rank encodes what: units of modules that stand whole on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.graph import Floats


def place_units(seconds: Sequence[float], others: Floats) -> list[int]:
    """The rank of each unit of a replicated module, in the order in which microbatches need them.

    ``seconds`` are the units' work, ``others`` ``[P]`` what each rank has to do besides. Ranks share the work so that
    those which have any of it end with as much to do as each other, and no less than the rest; each unit goes where it
    leaves the least of a share taken. So the work is even in the end, and the units of any few microbatches are spread,
    too. Of ranks that are alike the last comes first: it waits longest for the first microbatch.
    """
    ranks = len(others)
    work = np.asarray(seconds, dtype=np.float64)
    low = np.sort(others)
    # The level to which the work, poured over the ranks, would rise if it stayed among the first 1, 2, ... of them.
    levels = (low.cumsum() + work.sum()) / np.arange(1, ranks + 1)
    share = np.maximum(levels.min() - others, 0.0)
    if not share.any():
        share = np.ones(ranks)
    taken = np.zeros(ranks)
    placed = []
    for own in work.tolist():
        after = np.where(share > 0, (taken + own) / np.where(share > 0, share, 1.0), np.inf)
        rank = ranks - 1 - int(np.argmin(after[::-1]))
        taken[rank] += own
        placed.append(rank)
    return placed
