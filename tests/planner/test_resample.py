"""Samples that change microbatches: never worse, nothing lost, no microbatch too long or empty, the same for all."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dip_megatron.planner import resample as module
from dip_megatron.planner.balance import GOAL, Work, assign
from dip_megatron.planner.exchange_agreement import Answer, Quote, SampleQuote, propose, settle
from dip_megatron.planner.resample import SampleWork, resample
from dip_megatron.planner.warm import warm_up_exchanges
from tests.drawn import settings

LENGTH = 30


def drawn(seed: int, replicas: int, each: int, ranks: int) -> tuple[SampleWork, Work]:
    """Microbatches worth their samples and something of their own; every replica has a size of document."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 6, replicas * each)
    microbatch = np.repeat(np.arange(replicas * each), counts)
    tokens = 1 + random.integers(0, 1 + 5 * (microbatch // each) // replicas + 1, len(microbatch))
    seconds = tokens[:, None] * random.uniform(0.5, 1.5, (len(tokens), ranks))
    whole = np.zeros((replicas * each, ranks))
    np.add.at(whole, microbatch, seconds)
    room = LENGTH - np.bincount(microbatch, tokens).astype(np.int64)
    work = Work(whole + 0.5, 1e6 * whole, np.repeat(np.arange(replicas), each), replicas)
    return SampleWork(seconds, 1e6 * seconds, tokens, microbatch, random.random(len(tokens)) < 0.1, room), work


def test_its_kernel_is_loaded_before_samples_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the very types that an exchange calls it with: for others it would be compiled while training waits."""
    called = []
    monkeypatch.setattr(module, "_exchange", lambda *given: called.append([numba.typeof(value) for value in given]))
    warm_up_exchanges(samples=True)
    propose(quotes(*drawn(3, 2, 2, 2)))
    assert len(called) == 2
    assert called[0] == called[1]


works = st.builds(drawn, st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=120, deadline=None)
@given(works)
def test_samples_even_replicas_and_nothing_is_lost(case):
    samples, work = case
    whole = assign(work, goal=1.0)
    found = resample(samples, work, whole.replica, goal=1.0)
    assert found.after.max() <= whole.after.max() * (1 + 1e-12)
    assert np.array_equal(found.moved, found.microbatch != samples.microbatch)
    assert not found.moved[samples.stays].any()
    counts = np.bincount(found.microbatch, minlength=len(samples.room))
    assert counts.min() >= 1
    tokens = np.bincount(found.microbatch, samples.tokens, len(counts))
    assert tokens.max() <= LENGTH
    # What replicas are worth afterwards is what their microbatches are, with other samples in them.
    after = work.seconds.copy()
    np.add.at(after, found.microbatch, samples.seconds)
    np.subtract.at(after, samples.microbatch, samples.seconds)
    np.testing.assert_allclose(work.sums(after, whole.replica).max(axis=1), found.after)
    held = work.held.copy()
    np.add.at(held, found.microbatch, samples.held)
    np.subtract.at(held, samples.microbatch, samples.held)
    assert work.sums(held, whole.replica).max() <= work.sums(work.held, work.replica).max() * (1 + 1e-8)


def quotes(samples: SampleWork, work: Work, slowness: float = 1.0) -> list[Quote | None]:
    each = len(work.replica) // work.replicas
    out: list[Quote | None] = []
    for r in range(work.replicas):
        mine, here = work.replica == r, samples.microbatch // each == r
        size = np.ones(each, dtype=np.int64)
        counts = np.bincount(samples.microbatch[here], minlength=len(mine))[mine]
        out.append(Quote(work.seconds[mine], work.held[mine] * 0, size, slowness, samples=SampleQuote(
            samples.seconds[here], samples.held[here] * 0, samples.tokens[here], np.ones(here.sum(), dtype=np.int64),
            counts, LENGTH,
        )))  # fmt: skip
    return out


@settings(max_examples=60, deadline=None)
@given(works)
@example(drawn(0, 2, 2, 3))  # the slowest replica gets faster, and the others more so: further from their mean
def test_what_is_proposed_brings_every_sample_to_one_microbatch(case):
    samples, work = case
    proposal = propose(quotes(samples, work))
    without = propose([quote and Quote(quote.seconds, quote.held, quote.sizes) for quote in quotes(samples, work)])
    assert proposal.gain_seconds >= without.gain_seconds * (1 - 1e-12)
    moves = proposal.samples
    if moves is None:
        assert proposal.digest() == without.digest()
        return
    assert without.after > GOAL
    assert proposal.digest() != without.digest()
    trained = [proposal.line(r) or [] for r in range(work.replicas)]
    before, after = ([getattr(moves, name)(r) for r in range(work.replicas)] for name in ("split", "packed"))
    for r, line in enumerate(trained):
        assert set(before[r]) == set(after[r]) <= set(line)
    loose = sorted(s for taken in before for numbers in taken.values() for s in numbers)
    assert loose == sorted(s for packs in after for numbers in packs.values() for s in numbers)
    assert all(numbers for packs in after for numbers in packs.values())
    travelled = [move for together in moves.rounds() for move in together]
    assert moves.moved.any()
    changes = moves.replica[moves.before] != moves.replica[moves.after]
    assert sorted(move.number for move in travelled) == np.flatnonzero(changes).tolist()  # none to its own replica
    for move in travelled:
        assert any(move.number in numbers for numbers in before[move.source].values())
        assert any(move.number in numbers for numbers in after[move.target].values())


def test_samples_stay_where_that_would_cost_more_than_it_gains():
    samples, work = drawn(1, 4, 2, 2)
    proposal = propose(quotes(samples, work, slowness=1e9))
    assert proposal.samples is not None
    refused = settle(proposal, [Answer(proposal.digest(), 0.0, False)] * 4)
    assert (refused.assignment, refused.samples) == (None, None)


def test_many_replicas_of_few_microbatches_end_together():
    samples, work = drawn(3, 32, 2, 2)
    whole = assign(work)
    found = resample(samples, work, whole.replica)
    assert whole.after.max() / whole.after.mean() > 1.01
    assert found.after.max() / found.after.mean() <= 1.01


def test_what_does_not_belong_together_is_refused():
    ones, numbers = np.ones((2, 1)), np.array([0, 1])
    stays = np.zeros(2, dtype=np.bool_)
    with pytest.raises(ValueError, match="one a sample"):
        SampleWork(ones, ones, numbers[:1], numbers, stays, numbers)
    with pytest.raises(ValueError, match="microbatch must be 0 to 0"):
        SampleWork(ones, ones, numbers, numbers, stays, numbers[:1])
