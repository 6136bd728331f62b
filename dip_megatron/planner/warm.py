"""Loading what planning needs before the first batch is there."""

from __future__ import annotations

import numpy as np

from ..core import Kind, Schedule
from ..core.lower import make_plan
from ..core.verify import verify
from ..core.warm import smallest_graph


def warm_up_plans() -> None:
    """Load, or compile after an installation, the kernels that lower and verify plans: seconds once, then less than
    one."""
    graph = smallest_graph(2)
    order = np.array([int(Kind.F), int(Kind.BW)], dtype=np.int32)
    verify(make_plan(graph, Schedule((order, order.copy()), np.zeros((1, 2), dtype=np.int8)), lower_bound=0.0))
