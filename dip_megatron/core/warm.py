"""The smallest graphs: for loading compiled kernels before the first batch is there."""

from __future__ import annotations

import numpy as np

from .graph import Floats, OperationGraph
from .modules import ModalityModule, Unit


def smallest_graph(ranks: int) -> OperationGraph:
    """One microbatch of one module, a layer a rank; seconds and bytes of 1, no limit of memory."""
    return _graph(ranks, 1, np.ones(1), np.inf)


def tight_graph() -> OperationGraph:
    """Three microbatches on two ranks, whose memory takes one and a half of them: some are recomputed, which holds half
    as much and takes 1 s longer."""
    return _graph(2, 3, np.array([1.0, 0.5]), 1.5)


def _graph(ranks: int, microbatches: int, held: Floats, memory_limit: float) -> OperationGraph:
    """``held`` are the bytes of a stage's activations with each of its strategies, of which each takes 1 s longer than
    the one before."""
    ones = np.ones((len(held), microbatches, ranks))
    backward = ones + np.arange(len(held))[:, None, None]
    names = tuple(("none", "full")[: len(held)] for _ in range(ranks))
    return OperationGraph(
        ranks=ranks,
        modules=(ModalityModule("warm", ((1,) * ranks,)),),
        units=tuple(Unit(m, "warm", m) for m in range(microbatches)),
        forward=ones,
        backward=backward,
        weight=ones,
        fused=backward + ones,
        activation=ones * held[:, None, None],
        deferred_activation=np.zeros(ones.shape),
        transfer=np.zeros(microbatches),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, memory_limit),
        strategies=(names,) * microbatches,
    )
