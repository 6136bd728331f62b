"""Leaving out memory strategies, for ablations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, OperationGraph
from ...core.strategies import allowed_strategies, names_in, strategy_names


def restrict(graph: OperationGraph, *, recompute: bool, offload: bool) -> tuple[OperationGraph, NDArray[np.int8]]:
    """``graph`` without the candidates that recompute or offload, and where each of its candidates stood before
    (``[C, S, P]``). A forbidden candidate is replaced by the last allowed one before it, or by the first
    allowed; of a graph without names all candidates but the first count as recomputing."""
    count = graph.candidates
    origin = np.zeros((count, graph.virtual_microbatches, graph.ranks), dtype=np.int8)
    for s in range(graph.virtual_microbatches):
        for p in range(graph.ranks):
            allowed = [c for c in range(count) if _allowed(graph, c, s, p, recompute, offload)] or [0]
            for c in range(count):
                origin[c, s, p] = max((a for a in allowed if a <= c), default=allowed[0])
    index = origin.astype(np.int64)

    def pick(array: Floats) -> Floats:
        return np.ascontiguousarray(np.take_along_axis(array, index, axis=0))

    names = tuple(
        tuple(tuple(graph.strategy_name(int(origin[c, s, p]), s, p) for c in range(count)) for p in range(graph.ranks))
        for s in range(graph.virtual_microbatches)
    )
    return graph.changed(pick, strategies=names), origin


def _allowed(graph: OperationGraph, c: int, s: int, p: int, recompute: bool, offload: bool) -> bool:
    name = graph.strategy_name(c, s, p) if graph.strategies else ("none" if c == 0 else "full")
    left, known = allowed_strategies(recompute=recompute, offload=offload), strategy_names()
    return all(kind in left or (recompute and kind not in known) for kind in names_in(name))


def restore(strategy: NDArray[np.int8], origin: NDArray[np.int8]) -> NDArray[np.int8]:
    """Strategies ``[S, P]`` of the restricted graph as candidates of the original one."""
    return np.ascontiguousarray(np.take_along_axis(origin, strategy[None].astype(np.int64), axis=0)[0])
