"""What replicas agree on from what they tell one another: the same for all, never at a loss, in bounded steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.planner.balance import lines
from dip_megatron.planner.exchange_agreement import (
    TOO_LARGE,
    UNEQUAL,
    Answer,
    Move,
    Proposal,
    Quote,
    propose,
    rounds,
    settle,
)
from tests.drawn import settings


def quotes(seed: int, replicas: int, each: int, size: int = 1000) -> list[Quote | None]:
    random = np.random.default_rng(seed)
    out: list[Quote | None] = []
    for _ in range(replicas):
        seconds = random.lognormal(0.0, 1.0, (each, 1)) * random.uniform(0.5, 1.5, (each, 2))
        out.append(Quote(seconds, np.ones((each, 2)), random.integers(1, size, each)))
    return out


def answers(proposal: Proposal, *left: float) -> list[Answer]:
    return [Answer(proposal.digest(), seconds, False) for seconds in left]


drawn = st.builds(quotes, st.integers(0, 1000), st.integers(2, 9), st.integers(1, 6))


@settings(max_examples=80, deadline=None)
@given(drawn, st.sampled_from(["swap", "free"]))
def test_moves_bring_every_microbatch_to_one_replica_with_few_at_a_time(given_quotes, mode):
    proposal = propose(given_quotes, mode)
    replicas, count = len(given_quotes), sum(proposal.counts)
    has = [proposal.line(r) for r in range(replicas)]
    if proposal.assignment is None:
        assert proposal.reason
        assert has == [None] * replicas
        assert proposal.rounds() == []
        return
    assert sorted(n for line in has for n in line or []) == list(range(count))
    owner = np.repeat(np.arange(replicas), proposal.counts)
    moves = [move for moves in proposal.rounds() for move in moves]
    assert len(moves) == len({move.number for move in moves}) == int(proposal.assignment.moved.sum())
    for move in moves:
        assert owner[move.number] == move.source != move.target
        assert move.number in (has[move.target] or [])
    for together in proposal.rounds():
        assert len({m.source for m in together}) == len({m.target for m in together}) == len(together)
    assert proposal.assignment.after.max() < proposal.assignment.before.max()
    assert proposal.gain_seconds > 0
    # What stays, stays in its place, unless counts changed before it.
    if mode == "swap":
        for r, line in enumerate(has):
            first = sum(proposal.counts[:r])
            assert all(owner[n] != r or n == first + place for place, n in enumerate(line or []))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1]), max_size=40))
def test_rounds_are_few(pairs):
    moves = [Move(number, *pair) for number, pair in enumerate(pairs)]
    found = rounds(moves)
    assert sorted(move for together in found for move in together) == moves
    busiest = max([sum(p[end] == r for p in pairs) for r in range(6) for end in (0, 1)], default=0)
    assert busiest <= len(found) <= max(2 * busiest - 1, 0)


def test_a_line_keeps_what_stays_in_its_place():
    before, after = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 0, 0, 1])
    assert lines(before, after, 2) == [[0, 3, 2], [1, 4]]
    assert lines(before, np.array([0, 1, 1, 1, 1]), 2) == [[0], [3, 4, 1, 2]]


def test_nobody_moves_at_a_loss():
    proposal = propose(quotes(3, 4, 4))
    assert proposal.assignment is not None
    cost = proposal.nominal_seconds
    assert 0 < cost < proposal.gain_seconds
    assert settle(proposal, answers(proposal, 0.0, 0.0)).assignment is not None
    dear = propose([quote and Quote(quote.seconds, quote.held, quote.sizes, 1e6) for quote in quotes(3, 4, 4)])
    refused = settle(dear, answers(dear, 10.0, 0.0))
    assert (refused.assignment, refused.reason) == (None, "moving microbatches would take longer than it gains")
    assert refused.after == refused.before == dear.before
    late = [Answer(dear.digest(), 0.0, True), Answer(dear.digest(), 5.0, False)]
    assert settle(dear, late).reason == "the numbers of a replica came late"
    # There is time enough for all: it is hidden.
    assert settle(dear, answers(dear, 1e9, 1e8)).assignment is not None


def test_everyone_must_come_to_the_same():
    proposal = propose(quotes(3, 4, 4))
    other = Answer("another", 1.0, False)
    assert settle(proposal, [*answers(proposal, 1.0), other]).reason == "replicas came to different assignments"


def test_replicas_that_do_not_agree_on_what_is_gained_move_nothing():
    """As on unlike processors: one would send what the other doesn't take."""
    proposal = replace(propose(quotes(3, 2, 4)), gain_seconds=1.0, nominal_seconds=1.0)
    other = replace(proposal, gain_seconds=float(np.nextafter(1.0, 0.0)))
    said = [*answers(proposal, 0.0), *answers(other, 0.0)]
    assert settle(proposal, answers(proposal, 0.0, 0.0)).assignment is not None
    assert [settle(each, said).assignment for each in (proposal, other)] == [None, None]


def test_what_cannot_be_balanced_stays():
    same = [Quote(np.ones((3, 2)), np.ones((3, 2)), np.ones(3, dtype=np.int64)) for _ in range(3)]
    assert propose(same).reason == "there is too little to gain"
    assert propose([*same, None]).reason == "the data of a replica has ended"
    large = propose(quotes(3, 4, 4), largest=0)
    assert (large.assignment, large.reason) == (None, "there is too little to gain")


def coupled_quotes(seed: int, replicas: int, each: int) -> list[Quote | None]:
    """Half of what a microbatch takes, about, meets the others'."""
    out: list[Quote | None] = []
    for i, quote in enumerate(quotes(seed, replicas, each)):
        assert quote is not None
        share = np.random.default_rng([seed, i]).uniform(0.3, 0.7, (each, 1))
        out.append(replace(quote, meeting=share * quote.seconds))
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from([2, 4]), st.integers(2, 5))
def test_replicas_that_share_experts_aim_at_alike_slots(seed, groups, group, each):
    """All have as many microbatches as before, none is lost, and the slowest group waits less."""
    replicas = groups * group
    proposal = propose(coupled_quotes(seed, replicas, each), group=group)
    if proposal.assignment is None:
        assert proposal.reason
        return
    has = [proposal.line(r) or [] for r in range(replicas)]
    assert sorted(n for line in has for n in line) == list(range(replicas * each))
    assert {len(line) for line in has} == {each}
    assert len(proposal.assignment.after) == groups
    assert proposal.assignment.after.max() < proposal.assignment.before.max()


def test_alike_slots_are_worth_more_than_equal_sums_there():
    """Two replicas of equal sums, which wait for one another in every slot."""
    given_quotes = [
        Quote(np.array(seconds), np.ones((4, 1)), np.array([1, 1, 1, 1]), 1.0, np.array(seconds))
        for seconds in ([[5.0], [5.0], [5.0], [5.0]], [[9.0], [9.0], [1.0], [1.0]])
    ]
    assert propose(given_quotes).assignment is None  # 20 seconds each
    found = propose(given_quotes, group=2)
    assert found.assignment is not None  # 28 seconds as they are: 9 with 9, 5 with 5 twice, 1 with 1 make 20
    assert found.assignment.after.tolist() == [20.0]


def test_replicas_that_share_experts_move_nothing_too_large_and_count_alike():
    several = coupled_quotes(3, 4, 4)
    assert propose(several, group=2, largest=1.0).reason == TOO_LARGE
    assert propose([*several[:3], *coupled_quotes(4, 1, 3)], group=2).reason == UNEQUAL
