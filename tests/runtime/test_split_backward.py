"""A backward in two, and every memory strategy, give the gradients of Megatron's own run, wherever W stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.strategies import strategy_names
from tests.drawn import settings_of_ranks
from tests.processes import team
from tests.runtime.equal import merged
from tests.runtime.llava_case import Case, reference
from tests.runtime.split_case import Drawn, Wrap, split_run
from tests.runtime.test_equality import assert_equal


def check(case, world, drawn, wrap=None):
    """Equality with Megatron's PP1 run; the number of W on each rank."""
    answers = team(world).run(split_run, case, drawn, wrap)
    assert_equal(case, merged(team(1).run(reference, case)), merged([a[:2] for a in answers]))
    return [a[2] for a in answers]


@settings_of_ranks(12)
@given(
    images=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=2, max_size=4).map(tuple),
    segments=st.booleans(),
    strategies=st.sets(st.sampled_from(strategy_names()), min_size=1).map(sorted).map(tuple),
    micro_batch_size=st.integers(1, 2),
    wrap=st.sampled_from(
        [Wrap(), Wrap(ddp=True), Wrap(ddp=True, overlap=True), Wrap(ddp=True, overlap=True, fused=True)]
    ),
    seed=st.integers(0, 1000),
)
def test_two_ranks_equal_one(images, segments, strategies, micro_batch_size, wrap, seed):
    vision, language = (((1, 1), (1, 2)), ((1, 1), (2, 1))) if segments else (((1, 2),), ((2, 1),))
    case = Case(images, vision, language, micro_batch_size=micro_batch_size)
    check(case, 2, Drawn(seed, 0.7, strategies), wrap)


def test_four_ranks_equal_one():
    case = Case((3, 0, 1, 2, 2), vision=((1, 1, 0, 1),), language=((1, 2, 1, 1), (1, 1, 1, 0)))
    check(case, 4, Drawn(5, 0.7, strategy_names()))


@pytest.mark.parametrize("wrap", [Wrap(), Wrap(ddp=True, fused=True)], ids=["autograd", "fused accumulation"])
def test_all_backwards_in_two(wrap):
    # One vision unit of two images at most in each of three microbatches, two in one; four of the language model.
    assert check(Case((2, 0, 3, 1)), 2, Drawn(split=1.0), wrap) == [8, 8]


@pytest.mark.parametrize(
    ("freeze", "weights"),
    [(("vision_model",), [4, 8]), (("language_model",), [4, 4]), (("vision_model", "language_model"), [0, 4])],
)
def test_frozen_modules(freeze, weights):
    """A chunk without weights to train has no W; the projector alone has one."""
    case = Case((2, 0, 3, 1), freeze=freeze)
    assert check(case, 2, Drawn(3, 1.0, ("none", "mlp", "full"))) == weights


@pytest.mark.parametrize("strategy", strategy_names()[1:])
def test_dropout_is_repeated(strategy):
    """What is recomputed drops the same elements: gradients are those of a run that keeps everything."""
    case, dropout = Case((2, 0, 3)), Wrap(dropout=0.2)
    kept = merged([a[:2] for a in team(2).run(split_run, case, Drawn(2, 0.0), dropout)])
    again = merged([a[:2] for a in team(2).run(split_run, case, Drawn(2, 1.0, (strategy,)), dropout)])
    losses, gradients = kept
    assert_equal(case, (losses[0], gradients), again)
    without = team(2).run(split_run, case, Drawn(2, 0.0))[-1][0]
    assert (without[0][0]["lm loss"] != losses[0][0]["lm loss"]).any()


def outside_run(rank, world, case, drawn):
    """As :func:`split_run`, with a memory strategy of another package; instead of the number of W, that of its runs."""
    from tests import outside_strategy

    outside_strategy.RAN.clear()
    with outside_strategy.registered():
        answer = split_run(rank, world, case, drawn, None)
    return (*answer[:2], len(outside_strategy.RAN))


def test_a_strategy_from_outside_runs():
    case = Case((2, 0, 3))
    answers = team(2).run(outside_run, case, Drawn(2, 0.5, ("outside", "full", "none")))
    assert_equal(case, merged(team(1).run(reference, case)), merged([a[:2] for a in answers]))
    assert all(a[2] > 0 for a in answers)
