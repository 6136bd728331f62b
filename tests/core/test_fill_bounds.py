"""What ranks lose while the pipeline fills: the first wave of an encoder's units, against proven optima and plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import ModalityModule, OperationGraph, Unit, bounds
from dip_megatron.core.bounds import bounded, lower_bound
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.schedulers.dip.engine import search
from dip_megatron.schedulers.joint import search_joint
from tests.drawn import settings
from tests.schedulers.dip.cpsat import solve

MS = 1e-3


def even_graph(seed: int, *, ranks: int, units: list[list[int]], text: int = 3, uneven: float = 0.0) -> OperationGraph:
    """Encoder units of so many ms for each microbatch, as long on every rank (but for ``uneven`` of the stages, one ms
    longer), and a text model of ``text`` ms a rank; backwards as long as forwards."""
    rng = np.random.default_rng(seed)
    modules = (
        ModalityModule("vision", ((1,) * ranks,)),
        ModalityModule("text", ((1,) * ranks,), ("vision",)),
    )
    made: list[Unit] = []
    sizes: list[int] = []
    for m, mine in enumerate(units):
        last = len(made) + len(mine)
        made += [Unit(len(made) + j, "vision", m, j, 1, (last,)) for j in range(len(mine))]
        made.append(Unit(last, "text", m, 0, 1, ()))
        sizes += [*mine, text]
    seconds = np.repeat(np.array(sizes, dtype=float)[:, None], ranks, axis=1)
    seconds = (seconds + (rng.random(seconds.shape) < uneven))[None] * MS
    return OperationGraph(
        ranks=ranks, modules=modules, units=tuple(made), forward=seconds, backward=seconds, weight=seconds,
        fused=2.0 * seconds, activation=np.ones_like(seconds), deferred_activation=np.ones_like(seconds),
        transfer=np.zeros(len(made)), static_bytes=np.zeros(ranks), memory_limit=np.full(ranks, np.inf),
    )  # fmt: skip


def drawn(seed: int, *, ranks: int, microbatches: int, most: int) -> OperationGraph:
    rng = np.random.default_rng(seed)
    units = [[int(x) for x in rng.choice([1, 4, 5], size=int(rng.integers(1, most + 1)))] for _ in range(microbatches)]
    return even_graph(seed, ranks=ranks, units=units, text=int(rng.integers(1, 4)), uneven=float(rng.choice([0, 0.1])))


def test_a_small_unit_does_not_fill_the_pipeline():
    """One unit of 1 ms goes first, all others take 5 ms: the last of five ranks loses 4 times 5 ms, less what it
    can do before the first of them comes."""
    graph = even_graph(0, ranks=5, units=[[1, 5, 5, 5], [5, 5, 5, 5]])
    np.testing.assert_allclose(bounded(graph).wave, np.arange(5) * 5 * MS, rtol=1e-9)
    found = search(graph, budget_seconds=60, evaluations=300, deterministic=True)
    assert lower_bound(graph) <= found.iteration_time
    # Nor where much of what comes first is small, which then is what runs until something else may.
    many = even_graph(0, ranks=5, units=[[1] * 20, [5]])
    assert bounded(many).wave.max() < 20 * MS


@pytest.mark.parametrize("seed", range(6))
def test_no_optimum_is_below_the_bound(seed: int) -> None:
    graph = drawn(seed, ranks=3, microbatches=2, most=2)
    assert lower_bound(graph) <= solve(graph, seconds=3).time + 1e-9


@settings(30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_plan_is_below_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = drawn(seed, ranks=int(rng.integers(2, 7)), microbatches=int(rng.integers(1, 5)), most=5)
    found = search(graph, budget_seconds=60, evaluations=100, deterministic=True)
    assert lower_bound(graph) <= found.iteration_time


@settings(10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_joint_plan_is_below_the_joint_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, microbatches = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    graphs = [drawn(seed + g, ranks=ranks, microbatches=microbatches, most=4) for g in range(2)]
    for with_experts in (["text"], ["vision"]) if len({g.units for g in graphs}) == 1 else (["text"],):
        experts = ExpertLayers.every(graphs[0].modules, with_experts)
        found = search_joint(graphs, experts, budget_seconds=0.0, evaluations=200)
        assert found.lower_bound <= found.iteration_time * (1 + 1e-9)


def test_the_wave_raises_both_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [even_graph(g, ranks=8, units=[[1, 5, 5, 5, 5]] * 4) for g in range(2)]
    experts = ExpertLayers.every(graphs[0].modules, ["text"])
    alone, joint = lower_bound(graphs[0]), lower_bound(*graphs, experts=experts)
    monkeypatch.setattr(bounds, "idle_of_first_wave", lambda graph, *_: np.zeros(graph.ranks))
    assert alone > 1.01 * lower_bound(graphs[0])
    assert joint > 1.01 * lower_bound(*graphs, experts=experts)


def test_nothing_is_said_of_segments_that_run_backwards() -> None:
    graph = even_graph(0, ranks=4, units=[[1, 5, 5]] * 2)
    turned = tuple(replace(m, reversed=(True,)) if m.name == "vision" else m for m in graph.modules)
    assert not bounded(replace(graph, modules=turned)).wave.any()
