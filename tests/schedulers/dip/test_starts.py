"""What the search starts from: orders with long chains between short ones, and units that are held back."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import check_complete
from dip_megatron.core.simulate import simulate_compiled
from dip_megatron.schedulers.dip.incumbent import listed
from dip_megatron.schedulers.dip.keys import make_keys
from dip_megatron.schedulers.dip.memory import evaluate, make_refill
from dip_megatron.schedulers.dip.portfolio import nested
from dip_megatron.schedulers.dip.problem import make_problem
from dip_megatron.schedulers.dip.work import make_work
from tests.drawn import settings

from ...graphs import random_graph, with_memory


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1.2, np.inf]))
def test_every_draw_is_a_plan(seed, memory):
    """Complete and within memory, also where that is all that one microbatch needs."""
    graph = random_graph(seed, candidates=3, memory=np.inf)
    graph = with_memory(graph, memory) if np.isfinite(memory) else graph
    q = make_problem(graph)
    work, refill = make_work(q), make_refill(q)
    for keys in islice(nested(q, split=True), 12):
        assert sorted(keys.order_forward) == list(range(q.groups))
        time = evaluate(q, keys, work, refill, np.inf)
        schedule = listed(q, work)
        assert check_complete(graph, schedule) is None
        timeline = simulate_compiled(graph, schedule)
        assert timeline.iteration_time <= time * (1 + 1e-9)  # an order doesn't wait for what its draw waited for
        assert np.all(timeline.peak_bytes <= graph.memory_limit)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.data())
def test_held_back(seed, data):
    """A group that is held back until all others have ended comes last on every rank."""
    graph = random_graph(seed, candidates=1, memory=np.inf)
    q = make_problem(graph)
    work, refill = make_work(q), make_refill(q)
    last = data.draw(st.integers(0, q.groups - 1))
    keys = make_keys(q, split=True)
    keys.release[q.group == last] = 1.0 + float(q.graph.duration.sum()) + float(graph.transfer.sum()) * q.graph.ranks
    evaluate(q, keys, work, refill, np.inf)
    for rank, order in enumerate(listed(q, work).orders):
        stages = order % graph.virtual_microbatches
        mine = (q.group[stages] == last)[~graph.is_idle[stages, rank]]
        assert mine.sum() == 0 or mine[-mine.sum() :].all()
