"""Which microbatches of coupled replicas meet."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.schedulers.joint import as_they_come, pairings, search_joint
from dip_megatron.schedulers.joint.pairing import OWN_WEIGHTS, kinds_of, longest_work, refined, slot_work
from tests.core.test_fill_bounds import even_graph
from tests.drawn import settings
from tests.schedulers.joint.test_joint import coupled

seeds = st.integers(0, 2**32 - 1)


def drawn_work(seed: int, replicas: int, microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    meeting, own = (rng.lognormal(0.0, 0.6, (replicas, microbatches)) for _ in range(2))
    return meeting, own


@settings(40, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]))
def test_refining_keeps_a_pairing_and_never_lengthens_it(seed, replicas, microbatches, weight):
    meeting, own = drawn_work(seed, replicas, microbatches)
    start = np.stack([np.random.default_rng(seed + g).permutation(microbatches) for g in range(replicas)])
    slots = refined(meeting, own, start, weight)
    np.testing.assert_array_equal(np.sort(slots, axis=1), np.arange(microbatches)[None].repeat(replicas, axis=0))
    assert longest_work(meeting, own, slots, weight) <= longest_work(meeting, own, start, weight) * (1 + 1e-9)
    longest = [np.take_along_axis(x, slots, axis=1).max(axis=0) for x in (meeting, own)]
    assert np.all(np.diff(longest[0] + longest[1]) <= 0)  # the longest slot first


@pytest.mark.parametrize("seed", range(5))
def test_two_replicas_are_paired_as_well_as_can_be(seed: int) -> None:
    meeting, own = drawn_work(seed, 2, 6)
    start = np.repeat(np.arange(6)[None], 2, axis=0)
    every = [np.stack([np.arange(6), order]) for order in permutations(range(6))]
    least = min(longest_work(meeting, own, slots, 1.0) for slots in every)
    assert longest_work(meeting, own, refined(meeting, own, start, 1.0), 1.0) == pytest.approx(least)


def test_three_replicas_come_close() -> None:
    """Better than the best order by work in the mean, and near to the best pairing there is."""
    found, sorted_by, best = [], [], []
    for seed in range(6):
        meeting, own = drawn_work(seed, 3, 5)
        starts = [np.argsort(-(a * meeting + b * own), axis=1) for a, b in ((1, 1), (3, 1), (1, 0), (0, 1))]
        found.append(min(longest_work(meeting, own, refined(meeting, own, s, 1.0), 1.0) for s in starts))
        sorted_by.append(min(longest_work(meeting, own, s, 1.0) for s in starts))
        orders = list(permutations(range(5)))
        every = (np.stack([np.arange(5), *pair]) for pair in product(orders, orders))
        best.append(min(longest_work(meeting, own, slots, 1.0) for slots in every))
    assert np.mean(found) < np.mean(sorted_by)
    assert np.mean(found) <= 1.02 * np.mean(best)


@pytest.mark.parametrize("seed", range(4))
def test_only_what_can_meet_does(seed: int) -> None:
    """Encoders with experts, of unequally many units: pairings, and the plans that follow, are of microbatches with as
    many of them; without any such pairing the reason is told."""
    rng = np.random.default_rng(seed)
    units = [[int(x) for x in rng.choice([1, 4, 5], size=n)] for n in (1, 3, 3, 2)]
    graphs = [even_graph(seed + g, ranks=3, units=[units[int(m)] for m in rng.permutation(4)]) for g in range(2)]
    experts = ExpertLayers.every(graphs[0].modules, ["vision"])
    kinds = kinds_of(graphs, experts)
    assert sorted(kinds[0]) == sorted(kinds[1]) == [0, 1, 2, 2]
    for slots in pairings(graphs, experts):
        paired = np.take_along_axis(kinds, slots, axis=1)
        assert np.array_equal(paired[0], paired[1])
    found = search_joint(graphs, experts, budget_seconds=0.0, evaluations=100)
    assert found.lower_bound <= found.iteration_time * (1 + 1e-9)
    fewer = even_graph(seed, ranks=3, units=units[:3] + units[:1])
    with pytest.raises(CouplingError, match="units of vision, which meet"):
        search_joint([graphs[0], fewer], experts, budget_seconds=0.0, evaluations=100)


@settings(20, deadline=None)
@given(seeds)
def test_the_best_pairings_come_first(seed):
    graphs, experts = coupled(seed)
    each = [slot_work(graph, experts.meets(graph)) for graph in graphs]
    met, own = (np.stack([pair[i] for pair in each]) for i in (0, 1))
    tried = pairings(graphs, experts)
    assert any(np.array_equal(slots, as_they_come(graphs)) for slots in tried)
    for i, a in enumerate(tried):
        assert not any(np.array_equal(a, b) for b in tried[:i])
    least = min(longest_work(met, own, slots, OWN_WEIGHTS[0]) for slots in tried)
    assert longest_work(met, own, tried[0], OWN_WEIGHTS[0]) == pytest.approx(least)
