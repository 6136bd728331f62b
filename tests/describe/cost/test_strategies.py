"""Memory strategies: their grammar, and which mixes of them a chunk is offered."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.strategies import StrategyError, format_strategy, parse_strategy, strategy_names
from dip_megatron.describe.cost.strategies import combine, frontier, pareto, pick
from tests.drawn import settings

names = st.lists(st.sampled_from(strategy_names()), max_size=12)
costs = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=4)


@given(names)
def test_every_choice_of_layers_survives_its_text(layers: list[str]) -> None:
    assert parse_strategy(format_strategy(layers), len(layers)) == tuple(layers)


def test_texts_read_as_documented() -> None:
    assert format_strategy(["full", "full", "selective", "none", "none"]) == "full:2+selective:1"
    assert format_strategy(["none", "full", "none"]) == "none:1+full:1"
    assert format_strategy([]) == format_strategy(["none"]) == "none"
    assert parse_strategy("mlp:1", 3) == ("mlp", "none", "none")


@pytest.mark.parametrize(
    "text", ["", "full", "full:0", "full:01", "full:1+", "full:1+full:2", "none:2", "full:4", "half:1", "full:1+none:1"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(StrategyError):
        parse_strategy(text, 3)


def _best(kinds: list[tuple[int, list[tuple[int, int]]]], limit: float) -> float:
    """Least seconds of all assignments within ``limit`` bytes, by trying every one."""
    options = [option for layers, choices in kinds for option in [choices] * layers]
    fitting = [sum(c[0] for c in combo) for combo in product(*options) if sum(c[1] for c in combo) <= limit]
    return min(fitting, default=np.inf)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), costs), min_size=1, max_size=2), st.integers(0, 300))
def test_the_frontier_holds_the_optimum_of_every_budget(kinds: list, limit: int) -> None:
    parts = [
        (layers, np.array([c[0] for c in choices], float), np.array([c[1] for c in choices], float))
        for layers, choices in kinds
    ]
    counts, seconds, size = combine(parts)
    inside = seconds[size <= limit]
    assert min(inside, default=np.inf) == _best(kinds, limit)
    for k, (layers, layer_seconds, _) in enumerate(parts):
        assert (counts[k].sum(axis=1) == layers).all()
        assert layer_seconds.shape == (counts[k].shape[1],)
    assert (np.diff(seconds) >= 0).all()
    assert (np.diff(size) < 0).all()


def test_long_chunks_are_thinned_but_keep_both_ends() -> None:
    seconds, size = np.array([1.0, 1.3, 1.4, 2.0, 2.2]), np.array([10.0, 8.0, 6.0, 1.0, 0.0])
    counts, total, memory = frontier(96, seconds, size)
    assert (counts.sum(axis=1) == 96).all()
    assert total[0] == pytest.approx(96.0)
    assert memory[-1] == 0.0


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 9)), min_size=1, max_size=60, unique=True), st.integers(2, 12)
)
def test_the_papers_rule_keeps_fastest_leanest_and_bucket_winners(points: list, limit: int) -> None:
    seconds = np.sort(np.array([p[0] for p in points]))
    size = -np.sort(-np.array([p[1] for p in points]))
    chosen = pick(seconds, size, limit)
    assert len(chosen) <= max(limit, 2)
    assert chosen[0] == 0
    assert chosen[-1] == len(seconds) - 1
    if len(points) > limit > 2:
        edges = np.linspace(size[-1], size[0], limit - 1)
        for low, high in pairwise(edges):
            inside = [i for i in range(1, len(size) - 1) if low <= size[i] < high]
            assert not inside or inside[0] in chosen


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 9)), min_size=3, max_size=60, unique=True), st.integers(3, 12)
)
def test_corners_come_before_buckets(points: list, limit: int) -> None:
    seconds, size = (np.array(x) for x in zip(*points, strict=True))
    keep = pareto(seconds, size)
    seconds, size = seconds[keep], size[keep]
    chosen = pick(seconds, size, limit, corners=True)
    assert len(chosen) <= max(limit, 2)
    assert {0, len(seconds) - 1} <= set(chosen.tolist())
    # For any price of a byte, one of the choices is best among all, if every corner found a place.
    if len(chosen) < limit:
        for price in (0.0, 0.1, 0.5, 1.0, 3.0):
            assert (seconds + price * size)[chosen].min() <= (seconds + price * size).min() + 1e-9
