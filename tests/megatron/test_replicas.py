"""Microbatches that change replicas arrive unharmed, once, and on all ranks of a replica alike."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from tests.drawn import settings
from tests.megatron.replica_case import (
    another,
    changes,
    contradicts,
    crates,
    cut,
    disagreement,
    hung,
    in_turn,
    little,
    resampled,
    stuck,
)
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


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(stages=st.sampled_from([1, 2]), each=st.integers(1, 4), seed=st.integers(0, 1000))
@example(stages=1, each=2, seed=175)  # a sample that left comes back, into the other microbatch of its replica
def test_samples_move_where_whole_microbatches_are_too_few(stages, each, seed):
    """The same samples, each once, no microbatch too long or empty, and as many microbatches as before."""
    answers = team(4).run(resampled, stages, each, seed)
    replicas = 4 // stages
    before, after, moved, samples, reason = answers[0][2]
    has, sizes = [held for held, _, _ in answers[:replicas]], [sizes for _, sizes, _ in answers[:replicas]]
    assert all(answers[p * replicas + r][0] == has[r] for p in range(stages) for r in range(replicas))
    assert all(len(held) == each for held in has)
    assert all(numbers for held in has for numbers in held)
    assert max(size for line in sizes for size in line) <= 20
    drawn = [sample for r in range(replicas) for m in crates(r, each, seed, 0) for sample in m.arguments["samples"]]
    assert sorted(n for held in has for numbers in held for n in numbers) == sorted(s["number"] for s in drawn)
    sums = [sum(line) for line in sizes]
    assert after == pytest.approx(max(sums) / (sum(sums) / replicas))
    assert after <= before
    assert bool(moved or samples) == (not reason)


def test_samples_do_move():
    """One microbatch a replica: nothing whole can even them."""
    *_, (before, after, moved, samples, _) = team(2).run(resampled, 1, 1, 4)[0]
    assert (before, moved) == (pytest.approx(1.25), 0)
    assert samples > 0
    assert after < 1.1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loses", r"Crates: a microbatch of .*, split and packed again, is one of "),
        ("raises", r"Crates.tokens: KeyErr"),
    ],
)
def test_a_packing_that_does_not_do_what_it_says_is_named(fault, message):
    assert all(re.match(message, said) for said in team(2).run(contradicts, fault))


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


def test_a_silent_peer_is_waited_for_no_longer_than_the_timeout():
    said, held = team(2).run(hung)[0]
    assert "broke off" in said
    assert "Restart from the last checkpoint" in said
    assert held == [0, 1, 2]


def test_a_microbatch_that_was_not_agreed_on_is_refused():
    own = Team(2)
    try:
        said = own.run(another)[0]
    finally:
        own.close()
    assert re.search(r"rank 1 sent microbatch \d \(\d+ bytes\), agreed was \d", said)


def test_nobody_moves_where_that_would_make_it_worse():
    """All decide alike: where replicas are late, where moving is slow, and where microbatches are too large."""
    first, second = team(2).run(in_turn)
    assert [line[:3] for line in first] == [line[:3] for line in second]
    ample, late, dear, some, none, ended = first
    assert ample[0] > 0
    assert ample[1:3] == ("", 0)
    assert late[:3] == (0, "the numbers of a replica came late", 1)
    assert dear[:3] == (0, "moving microbatches would take longer than it gains", 2)
    assert some[0] > 0
    assert none[:2] == (0, "there is too little to gain")
    assert ended[:3] == (0, "the data of a replica has ended", 3)
    assert late[3] == dear[3] == ended[3] == [0, 1, 2, 3]
    assert set(some[3]) >= {0, 2}  # the large ones stay


def test_all_ranks_of_all_replicas_learn_that_two_differ_in_what_trains() -> None:
    """Those whose own places agree, too: they would wait for the others."""
    own = Team(4)  # its groups of Megatron's are of other sizes than other tests want
    try:
        said = own.run(disagreement)
    finally:
        own.close()
    assert said[0].startswith("language, segment 0 on pipeline rank 1: data-parallel replicas disagree on what trains")
    assert said == [said[0]] * 4
