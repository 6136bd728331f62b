"""Microbatches that change replicas arrive unharmed, once, and on all ranks of a replica alike."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.drawn import settings
from tests.megatron.replica_case import changes, cut, little, stuck
from tests.processes import ProcessFailure, Team, team


@pytest.mark.parametrize("mode", ["swap", "free"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(stages=st.sampled_from([1, 2]), each=st.integers(1, 5), seed=st.integers(0, 1000))
def test_nothing_is_lost_and_the_slowest_gets_faster(mode, stages, each, seed):
    answers = team(4).run(changes, stages, each, seed, mode)
    replicas = 4 // stages
    before, after, moved, reason, worth = answers[0][1]
    has = [numbers for numbers, _ in answers[:replicas]]
    for stage in range(stages):
        assert [numbers for numbers, _ in answers[stage * replicas : (stage + 1) * replicas]] == has
    assert sorted(n for numbers in has for n in numbers) == list(range(replicas * each))
    sums = [sum(worth[n] for n in numbers) for numbers in has]
    start = [sum(worth[r * each : (r + 1) * each]) for r in range(replicas)]
    assert max(sums) <= max(start)
    assert after <= before
    assert bool(moved) == (reason == "") == (has != [list(range(r * each, (r + 1) * each)) for r in range(replicas)])
    if mode == "swap":
        assert {len(numbers) for numbers in has} == {each}


def test_nobody_moves_where_there_is_nothing_to_gain():
    assert set(team(4).run(little)) == {"there is too little to gain"}


def test_what_cannot_travel_is_named():
    for said in team(2).run(stuck):
        assert said.startswith("microbatch.arguments['a'][1]['b'] (function) can't be sent to another rank")


def test_an_exchange_cut_in_the_middle_stops_with_its_cause():
    own = Team(2)
    try:
        with pytest.raises(ProcessFailure, match=r"ranks \[0, 1\]\) broke off: .*nothing was trained on it"):
            own.run(cut)
    finally:
        own.close()
