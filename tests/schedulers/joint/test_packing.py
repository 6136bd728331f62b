"""Operations moved into gaps: nothing later, nothing over memory, and what comes of it may run."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.simulate import simulate_set_compiled
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.dip.random import seeded
from dip_megatron.schedulers.joint import chain as chains
from dip_megatron.schedulers.joint import one_slot_at_a_time, pairings, together
from dip_megatron.schedulers.joint.chain import JointChain, begin_joint, find_places, make_joint_problem
from dip_megatron.schedulers.joint.packing import make_packing, packed
from dip_megatron.schedulers.joint.sequences import first_over
from dip_megatron.schedulers.joint.times import latest_end
from tests.drawn import settings
from tests.schedulers.joint.test_joint import coupled

seeds = st.integers(0, 2**32 - 1)


def stirred(seed: int) -> JointChain:
    """A walk that has taken some steps of any kind, uphill as well."""
    graphs, experts = coupled(seed)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    chain = JointChain(t, make_joint_problem(t), one_slot_at_a_time(t), seed % 5, 0)
    chain.values[1] *= 1e4  # hot
    chain.step(0.0, 200)
    return chain


@settings(40, deadline=None)
@given(seeds)
def test_a_pass_starts_nothing_later_and_one_from_the_end_ends_nothing_earlier(seed):
    chain = stirred(seed)
    q, s = chain.q, chain.sequences
    begin_joint(q, s, seeded(0, 0))
    w = make_packing(q, s)
    for _ in range(3):
        for turned in (True, False):
            numbers = np.concatenate(find_places(q, s))
            start, end, time = s.start.copy(), s.end.copy(), latest_end(q, s)
            codes = [np.sort(o[:n]) for o, n in zip(s.orders, s.lengths, strict=True)]
            packed(q, s, w, turned)
            little = 1e-12 * time
            if turned:
                assert np.all(s.end[numbers] >= end[numbers] - little)
            else:
                assert np.all(s.start[numbers] <= start[numbers] + little)
            assert latest_end(q, s) <= time + little
            for line, (order, n) in enumerate(zip(s.orders, s.lengths, strict=True)):
                np.testing.assert_array_equal(np.sort(order[:n]), codes[line])  # the same operations
                assert first_over(q, s, line) < 0
            # The times of a pass are such as the orders can have.
            before = (s.start.copy(), latest_end(q, s))
            again = begin_joint(q, s, seeded(0, 0))
            assert np.all(s.start[numbers] <= before[0][numbers] + little)
            assert again <= before[1] + little
            s.start[:] = before[0]
            s.end[numbers] = s.start[numbers] + (end - start)[numbers]


@settings(20, deadline=None)
@given(seeds)
def test_packed_orders_may_run_and_take_what_the_walk_says(seed):
    chain = stirred(seed)
    graphs, experts = chain.t.graphs, chain.t.experts
    under_way = float(chain.values[0])
    chain.values[1] = np.inf  # what is under way counts, however slow
    chain.pack()
    assert chain.values[0] <= under_way
    schedules = chain.schedules()
    found = simulate_set_compiled(graphs, schedules, experts).iteration_time
    assert found == pytest.approx(chain.time, rel=1e-12)
    verify(*make_plan_set(graphs, schedules, experts, lower_bound=0.0).plans)


@settings(20, deadline=None)
@given(seeds)
def test_kicked_orders_may_run_and_the_best_stays(seed):
    graphs, experts = coupled(seed)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    chain = JointChain(t, make_joint_problem(t), one_slot_at_a_time(t), seed % 5, 0)
    for progress in (0.0, 0.0, 0.5, 1.0, 1.0):
        best, under_way = chain.time, float(chain.values[0])
        # Hot walks from whatever a kick leaves: most end higher than they were on the way.
        with patch.multiple(chains, NEAR=1.0, COOL=1e-2, COLD=1e-2):
            worth = chain.kick()
            if worth:
                chain.step(progress, 50)
                chain.settle(progress)
        if worth:
            assert chain.values[0] <= under_way or progress < 1.0
        else:
            assert chain.values[0] == under_way
        assert chain.time <= min(best, chain.values[0])
        assert begin_joint(chain.q, chain.sequences, seeded(0, 0)) == pytest.approx(chain.values[0], rel=1e-12)
        schedules = chain.schedules()
        found = simulate_set_compiled(graphs, schedules, experts).iteration_time
        assert found == pytest.approx(chain.time, rel=1e-12)
        verify(*make_plan_set(graphs, schedules, experts, lower_bound=0.0).plans)


def test_packing_alone_makes_pipelines_of_one_slot_at_a_time():
    """What runs one microbatch after the other has much room; most of it is used without a single step of a walk."""
    before = after = 0.0
    for seed in range(12):
        graphs, experts = coupled(seed, memory=np.inf)
        t = together(graphs, experts, pairings(graphs, experts)[0])
        start = one_slot_at_a_time(t)
        before += simulate_set_compiled(graphs, start, experts).iteration_time
        after += JointChain(t, make_joint_problem(t), start, 0, 0).time
    assert after < 0.9 * before
