"""Partitions: sub-microbatch sizes, layers, the paper's rules and the search, files."""

from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import OperationGraph
from dip_megatron.describe.cost import CostModel, build_graph, load_cluster
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import (
    Experts,
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Parallel,
    TokenEmbedding,
    TransformerLayer,
    load_model,
)
from dip_megatron.describe.partition import (
    ModuleLoad,
    Partition,
    balance_layers,
    efficient_unit_size,
    rank_loads,
    read_partition,
    write_partition,
)
from dip_megatron.describe.workload import GlobalBatch, Microbatch, load_workload, place_units
from dip_megatron.planner import partitioning
from dip_megatron.planner.partitioning import Given, Placement, choose_partition, greedy_judge, paper_partition
from tests.drawn import settings

H100 = load_cluster("h100")
VLM, T2V = load_model("vlm-s"), load_model("t2v-s")

loads = st.builds(
    ModuleLoad,
    name=st.just("m"),
    layers=st.integers(1, 7),
    segments=st.integers(1, 3),
    layer=st.floats(0.5, 5),
    stem=st.floats(0, 3),
    head=st.floats(0, 6),
)


def _value(modules: list[ModuleLoad], totals: list[tuple[int, ...]], ranks: int, weight: float) -> float:
    alone = sum(
        max(n[r] * m.layer + m.fixed(r, ranks) for r in range(ranks)) for m, n in zip(modules, totals, strict=True)
    )
    return max(rank_loads(modules, totals)) + weight * alone


def _ways(layers: int, ranks: int) -> list[tuple[int, ...]]:
    return [c for c in product(range(layers + 1), repeat=ranks) if sum(c) == layers]


@settings(max_examples=40, deadline=None)
@given(st.lists(loads, min_size=1, max_size=2), st.integers(1, 4), st.sampled_from([0.0, 0.1, 1.0]))
def test_layers_are_balanced_as_well_as_any_split_can(modules: list[ModuleLoad], ranks: int, weight: float) -> None:
    rows = balance_layers(modules, ranks, weight)
    totals = [tuple(map(sum, zip(*r, strict=True))) for r in rows]
    for m, r in zip(modules, rows, strict=True):
        assert (len(r), {len(line) for line in r}) == (m.segments, {ranks})
        assert sum(map(sum, r)) == m.layers
        assert min(map(min, r)) >= 0
    best = min(
        _value(modules, list(combo), ranks, weight) for combo in product(*(_ways(m.layers, ranks) for m in modules))
    )
    assert _value(modules, totals, ranks, weight) <= best * 1.002 + 1e-9


def test_a_heavy_head_takes_layers_away_from_its_rank() -> None:
    ((row,),) = balance_layers([ModuleLoad("language", 32, 1, layer=1.0, head=4.0)], 4)
    assert row == (9, 9, 9, 5)
    (rows,) = balance_layers([ModuleLoad("language", 32, 2, layer=1.0, head=4.0)], 4)
    assert rows[1][3] < rows[0][3]  # the head is on the last chunk only


def test_experts_behind_the_last_layer_keep_one_before_them() -> None:
    """Replicas that share the experts of multi-token prediction meet on its chunk, whatever the layers are worth."""
    layer = TransformerLayer(64, 128, 4, 4, gated=True, causal=True, experts=Experts(8, 2, 48, dense_first=1))
    shape = ModuleShape("language", "text", 4, layer, TokenEmbedding(128_000), LanguageHead(128_000), mtp=1)
    alone = MultimodalModel("moe", (shape,), Parallel(pp=2, dp=2, sequence_parallel=False))
    batches = [GlobalBatch((Microbatch(512, sequences=(512,)),) * 4)]
    rows = choose_partition(alone, H100, batches, budget_seconds=inf, max_trials=6).module("language").layers
    assert rows[-1][-1] == 0  # the head, thrice the vocabulary, is worth more than all layers
    shared = alone.with_parallel(ep=2)
    assert shared.parallel.coupled == 2
    rows = choose_partition(shared, H100, batches, budget_seconds=inf, max_trials=6).module("language").layers
    assert rows[-1][-1] > 0
    carried = replace(alone, modules=(replace(shape, carried=2),))  # embeddings come to the head, as in mcore-bridge
    rows = choose_partition(carried, H100, batches, budget_seconds=inf, max_trials=6).module("language").layers
    assert rows[-1][-1] > 0
    ((row,),) = balance_layers([ModuleLoad("language", 4, 1, layer=1.0, head=9.0, last=1)], 2)
    assert row == (3, 1)
    (rows,) = balance_layers([ModuleLoad("language", 4, 2, layer=1.0, head=9.0, last=1)], 2)
    assert (rows[1][1], sum(map(sum, rows))) == (1, 4)


def test_sub_microbatch_sizes_follow_the_95_percent_rule() -> None:
    batch = [Microbatch(8, (169,) * 48)]
    pricer = CostModel(VLM, H100)
    found = efficient_unit_size(pricer, "vision", batch)
    assert found.size is not None
    assert found.share >= 0.95
    assert found.most == 48
    strict = efficient_unit_size(pricer, "vision", batch, share=0.99)
    assert strict.size is None or strict.size > found.size
    assert efficient_unit_size(pricer, "vision", batch, share=0.01).size == 1
    assert efficient_unit_size(pricer, "language", batch).size is None  # packed text is one instance
    # Without launch overheads, weights to read or curves, slices cost nothing: one image is as efficient as many.
    free = replace(
        H100, efficiency=(), kernel_latency=0, node_latency=0, memory_bandwidth=1e30, node_bandwidth=1e30
    )  # fmt: skip
    assert efficient_unit_size(CostModel(VLM, free), "vision", batch).size == 1


def test_a_module_without_work_takes_whole_microbatches() -> None:
    partition = paper_partition(VLM, H100, [GlobalBatch((Microbatch(8192),))])
    assert [(m.unit_size, m.segments) for m in partition.modules] == [(None, 1), (None, 1)]


@pytest.mark.parametrize(("model", "workload"), [("vlm-s", "vlm-mix"), ("vlm-l", "vlm-dynamic"), ("t2v-l", "t2v-mix")])
def test_the_papers_rules_give_the_fastest_module_one_segment(model: str, workload: str) -> None:
    shape = load_model(model)
    partition = paper_partition(shape, H100, load_workload(workload, shape, 2, 8))
    partition.check(shape)
    assert min(m.segments for m in partition.modules) == 1
    for m in partition.modules:
        counts = [n for row in m.layers for n in row]
        assert max(counts) - min(counts) <= 1
        assert min(counts) >= 1
    assert len(partition.reasons) == len(shape.modules)


def _tiny(model: MultimodalModel, pp: int) -> MultimodalModel:
    modules = tuple(replace(m, layers=6) for m in model.modules)
    return replace(model, modules=modules).with_parallel(pp=pp)


@pytest.mark.parametrize(("name", "workload"), [("vlm-s", "vlm-mix"), ("t2v-s", "t2v-mix")])
def test_the_search_is_no_worse_than_the_papers_rules_and_repeats(name: str, workload: str) -> None:
    model = _tiny(load_model(name), 2)
    batches = load_workload(workload, model, 1, 4, seed=2)
    told: list[tuple[str, float]] = []
    first = choose_partition(
        model, H100, batches, budget_seconds=inf, max_trials=8, on_trial=lambda d, s: told.append((d, s))
    )
    first.check(model)
    judge = greedy_judge(400)

    def seconds(partition: Partition) -> float:
        return judge(build_graph(model, H100, partition, batches[0].microbatches))

    assert seconds(first) <= seconds(paper_partition(model, H100, batches))
    assert first == choose_partition(model, H100, batches, budget_seconds=inf, max_trials=8)
    assert 1 <= len(told) <= 8
    words = first.explain()
    assert "Simulated on 1 batch:" in words
    assert all(m.name in words for m in model.modules)


def test_the_judge_decides() -> None:
    """The search follows the judge it is given, here one that wants as many rows as possible."""
    model = _tiny(VLM, 2)
    batches = [GlobalBatch((Microbatch(100, (169,) * 4),))]

    def judge(graph: OperationGraph) -> float:
        return 1.0 / graph.virtual_microbatches

    chosen = choose_partition(model, H100, batches, judge=judge)
    assert [m.segments for m in chosen.modules] == [3, 3]
    assert chosen.module("vision").unit_size == 1


def test_what_is_settled_stays_and_the_rest_is_balanced_around_it() -> None:
    model = _tiny(VLM, 4)
    batches = [GlobalBatch((Microbatch(2000, (169,) * 4),) * 4)]
    given = {"vision": Given(((0, 5, 1, 0),), 3, sized=True)}
    chosen = choose_partition(model, H100, batches, budget_seconds=inf, max_trials=6, given=given)
    chosen.check(model)
    vision = chosen.module("vision")
    assert (vision.layers, vision.unit_size) == (((0, 5, 1, 0),), 3)
    language = [sum(column) for column in zip(*chosen.module("language").layers, strict=True)]
    assert language[1] == min(language) < max(language)
    sized = choose_partition(
        model, H100, batches, budget_seconds=inf, max_trials=6, given={"vision": Given(None, 1, sized=True)}
    )
    assert sized.module("vision").unit_size == 1


@pytest.mark.parametrize(("first", "later", "cores", "ends"), [
    (1000.0, 0.01, 1.0, False),  # compiling kernels is no search
    (0.0, 0.3, 0.3, False),  # other programs have the cores two thirds of the time
    (0.0, 0.3, 1.0, True),
    (0.0, 3.0, 0.01, True),  # but nobody waits for ever
])  # fmt: skip
def test_what_counts_against_the_budget(first: float, later: float, cores: float, ends: bool, monkeypatch) -> None:
    """``first`` and ``later``: seconds that judging takes by the clock; ``cores``: the share of them on a core."""
    model = _tiny(VLM, 2)
    batches = [GlobalBatch((Microbatch(100, (169,) * 4),))]
    now, trials = 0.0, 0

    def judge(graph: OperationGraph) -> float:
        nonlocal now, trials
        now += later if trials else first
        trials += 1
        return 1.0 / graph.virtual_microbatches

    clock = SimpleNamespace(monotonic=lambda: now, process_time=lambda: cores * now)
    chosen = choose_partition(model, H100, batches, judge=judge)
    all_trials, now, trials = trials, 0.0, 0
    monkeypatch.setattr(partitioning, "time", clock)
    again = choose_partition(model, H100, batches, judge=judge, budget_seconds=0.1 * all_trials)
    assert (trials < all_trials) == ends
    assert ends or again == chosen


@pytest.mark.parametrize("placement", ["segmented", "replicated", "either"])
@pytest.mark.parametrize("trials", [1, 2, 3, 5])
def test_as_many_partitions_are_tried_as_asked(placement: Placement, trials: int) -> None:
    model = _tiny(VLM, 2)
    told: list[str] = []
    chosen = choose_partition(
        model, H100, load_workload("vlm-mix", model, 1, 2, 3), judge=greedy_judge(1), budget_seconds=inf,
        max_trials=trials, on_trial=lambda text, _: told.append(text), placements={"vision": placement},
    )  # fmt: skip
    assert len(told) == trials
    assert f"the best of {trials} partition" in chosen.explain()
    assert placement == "either" or chosen.module("vision").replicated == (placement == "replicated")


def _placed(model: MultimodalModel, placement: str, memory_limit: float | None = None) -> tuple[bool, float]:
    """Whether the vision tower stands whole on every rank, and predicted seconds, the sum of its gradients included."""
    batches = load_workload("vlm-mix", model, 1, 4, 3)
    trials = 24 if placement == "either" else 12  # from each side
    chosen = choose_partition(
        model, H100, batches, memory_limit=memory_limit, budget_seconds=inf, max_trials=trials,
        placements={"vision": placement},  # type: ignore[dict-item]
    )  # fmt: skip
    pricer = CostModel(model, H100)
    graph = build_graph(model, H100, chosen, batches[0].microbatches, memory_limit=memory_limit)
    return chosen.module("vision").replicated, greedy_judge(400)(graph) + partitioning.copies_seconds(pricer, chosen)


def test_a_placement_is_chosen_by_predicted_time_within_memory() -> None:
    model = _tiny(VLM, 4)
    (cut, slow), (copied, fast), (either, best) = (_placed(model, p) for p in ("segmented", "replicated", "either"))
    assert (cut, copied) == (False, True)
    assert best <= min(slow, fast) * 1.001
    assert either == (fast < slow)


def test_units_of_a_module_on_every_rank_go_around_by_what_ranks_have_to_do_besides() -> None:
    alike = place_units([1.0] * 8, np.zeros(4))
    assert sorted(alike[:4]) == sorted(alike[4:]) == [0, 1, 2, 3]
    assert alike[0] == 3  # which waits longest for the first microbatch
    loaded = place_units([1.0] * 12, np.array([0.0, 4.0, 8.0, 100.0]))
    assert [loaded.count(rank) for rank in range(4)] == [8, 4, 0, 0]


def test_a_model_that_cannot_fit_is_refused_with_a_way_out() -> None:
    model = _tiny(VLM, 2)
    with pytest.raises(ValueError, match="raise pp or tp"):
        choose_partition(model, H100, load_workload("vlm-mix", model, 1, 2), memory_limit=1e9, max_trials=3)
    with pytest.raises(ValueError, match="at least one batch"):
        choose_partition(model, H100, [])


def test_partitions_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "partition.yaml"
    partition = paper_partition(VLM, H100, load_workload("vlm-mix", VLM, 1, 4))
    write_partition(path, partition)
    again = read_partition(path, VLM)
    assert again == partition
    assert again.reasons == partition.reasons
    assert again.explain() == partition.explain()


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        ("unit_size: 12", "unit_size: 0", "modules.vision.unit_size", "greater than 0"),
        ("- [16, 16, 16, 15]", "- [16, 16, 16, 16]", "modules.vision.layers", "add up to 64"),
        ("- [16, 16, 16, 15]", "- [32, 31]", "modules.vision.layers", "2 ranks"),
        ("- [16, 16, 16, 15]", "- [16, 16, 16, 15]\n    - [0]", "modules.vision.layers", "same number of ranks"),
        ("vision:", "sight:", "modules", "the model"),
        ("reasons", "because", "because", "no such key"),
    ],
)
def test_faults_in_partition_files_are_named(tmp_path: Path, old: str, new: str, place: str, reason: str) -> None:
    path = tmp_path / "partition.yaml"
    text = """
modules:
  vision:
    unit_size: 12
    layers:
    - [16, 16, 16, 15]
  language:
    unit_size: null
    layers:
    - [8, 8, 8, 8]
reasons: []
"""
    path.write_text(text)
    assert read_partition(path, VLM).module("vision").layers == ((16, 16, 16, 15),)
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigurationError) as caught:
        read_partition(path, VLM)
    assert str(caught.value).startswith(f"{path}: {place}")
    assert reason in str(caught.value)
