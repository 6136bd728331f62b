"""An exchange for coupled replicas keeps counts, loses nothing, and makes the slots of a group alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.planner.coupled_balance import CoupledWork, assign_coupled, group_cost, longest_first
from tests.drawn import settings

seeds = st.integers(0, 2**32 - 1)


def drawn_work(seed: int) -> CoupledWork:
    rng = np.random.default_rng(seed)
    group, groups, slots, ranks = (int(rng.integers(1, n)) for n in (5, 4, 7, 4))
    count = group * groups * slots
    meeting = rng.uniform(0.5, 2.0, (count, 1)) * rng.uniform(0.9, 1.1, (count, ranks))
    own = rng.uniform(0.0, 6.0, (count, 1)) * rng.uniform(0.9, 1.1, (count, ranks))
    replica = np.repeat(np.arange(group * groups), slots)
    return CoupledWork(meeting, own, replica, group * groups, group)


@settings(100, deadline=None)
@given(seeds)
def test_every_slot_of_every_replica_has_one_microbatch(seed):
    work = drawn_work(seed)
    found = assign_coupled(work)
    places = set(zip(found.replica.tolist(), found.slot.tolist(), strict=True))
    assert places == {(r, k) for r in range(work.replicas) for k in range(work.slots)}
    assert found.after.max() <= found.before.max() * (1 + 1e-12)
    np.testing.assert_array_equal(found.moved, found.replica != work.replica)
    for r in range(work.replicas):
        assert found.slot[found.order(r)].tolist() == list(range(work.slots))
    assert found.digest() == assign_coupled(work).digest()


@settings(50, deadline=None)
@given(seeds)
def test_names_change_nothing(seed):
    """Which replica of a group is called what, and which group, doesn't decide what a job takes."""
    work = drawn_work(seed)
    found = assign_coupled(work)
    if found.moved.any():
        shifted = (found.replica + work.group) % work.replicas
        np.testing.assert_allclose(np.sort(group_cost(work, shifted, found.slot)), np.sort(found.after))


def test_alike_microbatches_meet():
    """Two groups of two; each replica has a short and a long one: the long ones of a group meet, by what they take
    there and in all."""
    meeting = np.array([[1.0], [3.0], [1.1], [3.1], [1.2], [3.2], [1.3], [3.3]])
    work = CoupledWork(meeting, np.zeros_like(meeting), np.array([0, 0, 1, 1, 2, 2, 3, 3]), 4, 2)
    found = assign_coupled(work)
    for g in range(2):
        for k in range(2):
            mine = meeting[(found.replica // 2 == g) & (found.slot == k)]
            assert mine.max() - mine.min() < 0.5
    assert found.after.max() <= 4.6


def test_what_is_where_it_should_be_stays():
    meeting = np.array([[1.0], [3.0]] * 4)
    work = CoupledWork(meeting, np.zeros_like(meeting), np.repeat(np.arange(4), 2), 4, 2)
    assert not assign_coupled(work).moved.any()
    assert longest_first(work, work.replica).tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("replica", "replicas", "group", "reason"),
    [
        ([0, 0, 1, 1], 2, 3, "no whole number of coupled groups of 3"),
        ([0, 0, 0, 1], 2, 2, "equally many microbatches"),
        ([0, 0, 1], 2, 2, "one number each"),
    ],
)
def test_groups_that_can_not_be_are_refused(replica, replicas, group, reason):
    with pytest.raises(ValueError, match=reason):
        CoupledWork(np.ones((4, 2)), np.ones((4, 2)), np.array(replica), replicas, group)
