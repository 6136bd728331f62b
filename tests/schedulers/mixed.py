"""Mixed graphs: one module that holds all layers, one unit per microbatch."""

from __future__ import annotations

import numpy as np

from dip_megatron.core import ModalityModule, OperationGraph, Unit


def mixed_graph(
    ranks: int,
    microbatches: int,
    segments: int = 1,
    *,
    turned: bool = False,
    times: tuple[float, float, float] = (1.0, 1.0, 1.0),
    scale: np.ndarray | None = None,
    transfer: float = 0.0,
    held: float = 1.0,
    limit: float = np.inf,
    recompute: float = 0.0,
) -> OperationGraph:
    """Each stage takes ``times`` (F, B, W) divided by the segments, times ``scale`` of its microbatch. ``recompute``:
    add a second strategy that holds a tenth and lengthens B by that much."""
    virtual_microbatches = microbatches * segments
    factor = np.ones(microbatches) if scale is None else scale
    base = np.repeat(factor, segments)[:, None] * np.ones((virtual_microbatches, ranks)) / segments
    forward, backward, weight = (np.array([base * t]) for t in times)
    activation, deferred_activation = np.array([base * held]), np.array([base * held])
    if recompute:
        forward, weight, deferred_activation = (np.repeat(a, 2, axis=0) for a in (forward, weight, deferred_activation))
        backward = np.concatenate([backward, backward + recompute * base[None]])
        activation = np.concatenate([activation, activation / 10])
    layers = tuple((1,) * ranks for _ in range(segments))
    module = ModalityModule("model", layers, reversed=(False, True) if turned else ())
    return OperationGraph(
        ranks=ranks,
        modules=(module,),
        units=tuple(Unit(i, "model", i) for i in range(microbatches)),
        forward=forward,
        backward=backward,
        weight=weight,
        fused=backward + weight,
        activation=activation,
        deferred_activation=deferred_activation,
        transfer=np.full(virtual_microbatches, transfer),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, limit),
    )
