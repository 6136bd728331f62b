"""Loading what planning needs before the first batch is there."""

from __future__ import annotations

import numpy as np

from ..core import Kind, ModalityModule, Schedule, StageGraph, Unit
from ..core.lower import make_plan
from ..core.verify import verify


def warm_up_plans() -> None:
    """Load, or compile after an installation, the kernels that lower and verify plans: seconds once, then less than
    one."""
    one = np.ones((1, 1, 2))
    graph = StageGraph(
        ranks=2,
        modules=(ModalityModule("warm", ((1, 1),)),),
        units=(Unit(0, "warm", 0),),
        forward=one,
        backward=one,
        weight=one,
        fused=2 * one,
        activation=one,
        deferred_activation=one,
        transfer=np.zeros(1),
        static_bytes=np.zeros(2),
        memory_limit=np.full(2, np.inf),
    )
    order = np.array([int(Kind.F), int(Kind.BW)], dtype=np.int32)
    verify(make_plan(graph, Schedule((order, order.copy()), np.zeros((1, 2), dtype=np.int8)), lower_bound=0.0))
