"""The search and the lower bound against proven optima of small instances."""

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.core import bounds
from dip_megatron.core.bounds import lower_bound
from dip_megatron.core.simulate import simulate
from dip_megatron.schedulers.dip.engine import search
from dip_megatron.schedulers.dip.feasibility import DoesNotFitError
from tests.graphs import random_graph, with_memory
from tests.patience import LONG
from tests.schedulers.dip.cpsat import solve

# Drawn instances that are solved within a second or two; memory is tight in most.
EASY = [(8, 2), (11, 3), (22, 2), (24, 2), (32, 2), (34, 2), (42, 2), (44, 2), (47, 3), (54, 2), (92, 2), (102, 2)]


@pytest.mark.parametrize(("seed", "ranks"), EASY[1:7])
def test_close_to_the_optimum(seed: int, ranks: int) -> None:
    graph = random_graph(seed, ranks=ranks, microbatches=3, max_units=2, integer=True)
    optimum = solve(graph, seconds=LONG)
    assert optimum.optimal
    result = search(graph, budget_seconds=60, evaluations=6000, deterministic=True)
    assert lower_bound(graph) <= optimum.time + 1e-9
    assert optimum.time <= result.iteration_time + 1e-9
    assert result.iteration_time <= 1.03 * optimum.time
    assert simulate(graph, result.schedule).iteration_time == result.iteration_time


@pytest.mark.parametrize("seed", range(14))
def test_bound_holds_with_and_without_split(seed: int) -> None:
    graph = random_graph(
        seed, ranks=2, microbatches=2, max_units=1, max_segments=1, integer=True, candidates=1 + seed % 2
    )
    for split in (True, False):
        optimum = solve(graph, split=split, seconds=30)
        assert lower_bound(graph, split=split) <= optimum.time + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_bound_holds_where_memory_is_tight(seed: int) -> None:
    """No plan that CP-SAT finds is shorter, and knowing of memory never lowers the bound."""
    graph = random_graph(
        1000 + seed, ranks=2, microbatches=3, max_units=2, max_segments=1, integer=True, candidates=1 + seed % 3,
        memory=(1.0, 1.1, 1.3, 1.6)[seed % 4],
    )  # fmt: skip
    for split in (True, False):
        bound = lower_bound(graph, split=split)
        assert bound <= solve(graph, split=split, seconds=4).time + 1e-9
        assert bound >= lower_bound(with_memory(graph, float("inf")), split=split) * (1 - 1e-9)


def test_how_long_bytes_are_held_raises_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few microbatches fit at once, the bound is higher for knowing for how long each must be held."""
    graphs = [
        with_memory(random_graph(seed, ranks=3, microbatches=8, memory=float("inf"), frozen=False), 1.3)
        for seed in range(20)
    ]
    knowing = [lower_bound(graph) for graph in graphs]
    monkeypatch.setattr(bounds, "held_memory", lambda *_, **__: np.zeros(1))
    raised = [bound / lower_bound(graph) for graph, bound in zip(graphs, knowing, strict=True)]
    assert min(raised) >= 1.0
    assert np.mean(raised) > 1.02


def test_a_tight_limit_raises_the_bound() -> None:
    """The bound knows of memory: with room for one microbatch at a time ranks must idle."""
    loose = random_graph(5, ranks=4, microbatches=4, candidates=1, max_segments=1, memory=float("inf"), frozen=False)
    tight = with_memory(loose, 1.0)
    assert lower_bound(tight) > lower_bound(loose)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_that_nothing_fits(seed: int) -> None:
    graph = with_memory(random_graph(seed, ranks=2, microbatches=2, max_units=1, integer=True), 0.9)
    assert not solve(graph, seconds=LONG).feasible
    with pytest.raises(DoesNotFitError):
        search(graph, budget_seconds=1)


def test_bound_scales_with_time() -> None:
    graph = random_graph(17)
    seconds = ("forward", "backward", "weight", "fused", "transfer")
    slow = replace(graph, **{name: 2 * getattr(graph, name) for name in seconds})
    assert np.isclose(lower_bound(slow), 2 * lower_bound(graph), rtol=1e-9)
