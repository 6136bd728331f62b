"""Memory over time has the simulator's peaks, and comes back to what a rank always holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from dip_megatron.core import OperationGraph
from dip_megatron.core.simulate import memory_over_time, simulate
from dip_megatron.schedulers.greedy import greedy
from tests.graphs import small_graphs


@given(small_graphs(memory=np.inf))
def test_lines_have_the_peaks_of_the_simulation(graph: OperationGraph) -> None:
    schedule = greedy(graph)
    timeline = simulate(graph, schedule)
    lines = memory_over_time(graph, schedule, timeline.start, timeline.end)
    for rank, line in enumerate(lines):
        assert line.held.max() == pytest.approx(timeline.peak_bytes[rank])
        assert line.held[0] == graph.static_bytes[rank]
        assert line.held[-1] == pytest.approx(graph.static_bytes[rank], abs=1.0)
        assert np.all(np.diff(line.seconds) >= 0)
        assert len(line.seconds) == len(line.held) == 1 + 2 * len(schedule.orders[rank])
