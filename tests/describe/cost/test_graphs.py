"""Stage graphs from models and batches: work is conserved however the model is cut, and frozen parts do nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.strategies import parse_strategy
from dip_megatron.describe.cost import (
    CostModel,
    Costs,
    LayerRun,
    build_graph,
    load_cluster,
    priced_graph,
)
from dip_megatron.describe.model import (
    ModelError,
    ModulePartition,
    MultimodalModel,
    Partition,
    even_partition,
    load_model,
)
from dip_megatron.describe.workload import Clip, Microbatch, WorkloadError, load_workload
from tests.drawn import settings

H100 = load_cluster("h100")
VLM, T2V, THREE = load_model("vlm-s"), load_model("t2v-s"), load_model("vision-audio-llm")
BATCH = (Microbatch(8192 - 5 * 169, (169,) * 5), Microbatch(8192), Microbatch(80, (169,) * 48), Microbatch(9, (400,)))


def _cut(model: MultimodalModel, segments: dict[str, int], sizes: dict[str, int | None]) -> Partition:
    return even_partition(model, segments, sizes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.none() | st.integers(1, 20))
def test_work_is_the_same_however_layers_are_cut(vision: int, language: int, size: int | None) -> None:
    """Chunks only move layers about: per unit size the seconds over all stages are those of the uncut model."""
    one = build_graph(VLM, H100, _cut(VLM, {}, {"vision": size}), BATCH)
    cut = build_graph(VLM, H100, _cut(VLM, {"vision": vision, "language": language}, {"vision": size}), BATCH)
    for name in ("forward", "backward", "weight", "fused", "activation", "deferred_activation"):
        assert getattr(cut, name)[0].sum() == pytest.approx(getattr(one, name)[0].sum())
    state = [g.static_bytes.sum() for g in (one, cut)]
    assert state[0] == pytest.approx(state[1], rel=0.05)  # but for the workspace, all of it is the model's weights


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 47))
def test_smaller_slices_cost_more_in_all(size: int) -> None:
    """A slice reads the weights and launches the kernels anew, so that finer slices are never cheaper in total."""
    seconds = [
        build_graph(VLM, H100, _cut(VLM, {}, {"vision": s}), BATCH[2:3]).forward[0].sum() for s in (size, size + 1)
    ]
    units = [-(-48 // s) for s in (size, size + 1)]
    assert units[0] >= units[1]
    if units[0] > units[1]:
        assert seconds[0] > seconds[1]


@pytest.mark.parametrize(
    ("model", "workload"), [("vlm-l", "vlm-mix"), ("t2v-l", "t2v-mix"), ("vision-audio-llm", "vision-audio-mix")]
)
def test_graphs_of_shipped_models_are_sound(model: str, workload: str) -> None:
    shape = load_model(model)
    (batch,) = load_workload(workload, shape, 1, 8, seed=1)
    partition = _cut(shape, {shape.modules[0].name: 2}, {"vision": 12, "diffusion": 2})
    graph = build_graph(shape, H100, partition, batch.microbatches)
    assert graph.ranks == shape.parallel.pp
    assert {u.microbatch for u in graph.units} == set(range(8))
    assert (graph.fused[0] == graph.backward[0] + graph.weight[0]).all()
    assert (graph.fused <= graph.backward + graph.weight).all()
    assert (np.diff(graph.forward + graph.fused, axis=0) >= -1e-12).all()  # candidates stand fastest first
    assert (graph.forward > 0).all()
    assert (graph.transfer > 0).all()
    assert (graph.static_bytes < graph.memory_limit).all()
    for s in range(graph.virtual_microbatches):
        module = graph.module(graph.units[int(graph.unit_of[s])].module)
        for r in range(graph.ranks):
            assert len(graph.strategies[s][r]) == graph.candidates
            for text in graph.strategies[s][r]:
                parse_strategy(text, module.layers[graph.segment(s)][r])


def test_leaner_candidates_hold_less() -> None:
    graph = build_graph(VLM, H100, _cut(VLM, {}, {"vision": 12}), BATCH)
    assert (graph.activation[-1] < graph.activation[0]).all()


def test_a_text_only_microbatch_has_no_vision_unit() -> None:
    graph = build_graph(VLM, H100, _cut(VLM, {}, {"vision": 12}), BATCH)
    counts = [sum(u.module == "vision" and u.microbatch == m for u in graph.units) for m in range(len(BATCH))]
    assert counts == [1, 0, 4, 1]


FROZEN = [
    ({"vision": ()}, [("vision", False, False), ("language", True, True)]),
    ({"vision": ("head",)}, [("vision", False, False), ("language", True, True)]),
    ({"language": ()}, [("vision", True, True), ("language", True, False)]),
    ({"vision": ("head",), "language": ()}, [("vision", False, False), ("language", True, False)]),
]


@pytest.mark.parametrize(("trainable", "expected"), FROZEN)
def test_frozen_parts_have_no_weight_gradient_and_keep_nothing_before_the_first_trained_one(
    trainable: dict, expected: list
) -> None:
    modules = tuple(replace(m, trainable=trainable.get(m.name, m.trainable)) for m in VLM.modules)
    model = replace(VLM, modules=modules)
    graph = build_graph(model, H100, _cut(model, {"vision": 2}, {"vision": 12}), BATCH)
    assert ((graph.weight[0] > 0) == graph.has_weight).all()
    assert ((graph.backward[0] > 0) == graph.has_backward).all()
    assert ((graph.activation[0] > 0) == graph.has_backward).all()
    assert ((graph.deferred_activation[0] > 0) == graph.has_weight).all()
    for name, backward, weight in expected:
        rows = [s for s in range(graph.virtual_microbatches) if graph.units[int(graph.unit_of[s])].module == name]
        assert graph.has_backward[rows][:, 0].all() == backward
        assert graph.has_weight[rows][:, 0].all() == weight
    if trainable.get("vision") == ("head",):
        last = graph.module("vision").segments - 1
        assert graph.module("vision").trains(last, graph.ranks - 1)
    plain = build_graph(VLM, H100, _cut(VLM, {"vision": 2}, {"vision": 12}), BATCH)
    assert graph.static_bytes.sum() < plain.static_bytes.sum()
    assert graph.forward[0] == pytest.approx(plain.forward[0])


def _mixed() -> list[list[LayerRun]]:
    run = LayerRun
    return [
        [run("vision", 33, stem=True)],
        [run("vision", 30, head=True), run("language", 2, stem=True)],
        [run("language", 15)],
        [run("language", 15, head=True)],
    ]


def _staged(stages: list[list[LayerRun]], turned: bool = False) -> Partition:
    return Partition((ModulePartition.of_stages(stages, 4, turned=turned),))


def test_mixed_stages_hold_the_same_work() -> None:
    whole = build_graph(VLM, H100, _cut(VLM, {}, {}), BATCH)
    mixed = build_graph(VLM, H100, _staged(_mixed()), BATCH)
    assert mixed.forward.shape[1:] == (len(BATCH), 4)
    for name in ("forward", "fused", "activation", "deferred_activation"):
        assert getattr(mixed, name)[0].sum() == pytest.approx(getattr(whole, name)[0].sum())
    # No images, no work on a stage of ViT layers; the stage beside it still has its share of the LLM.
    assert mixed.forward[0, 1, 0] == 0.0
    assert mixed.forward[0, 1, 1] > 0.0
    assert mixed.module("model").layers == ((33, 32, 15, 15),)


def test_reversed_segments_turn_ranks_round() -> None:
    fifth = LayerRun("language", 5)
    stages = [*_mixed()[:3], [fifth], [fifth], [replace(fifth, head=True)], [], []]
    straight = build_graph(VLM, H100, _staged(stages), BATCH)
    turned = build_graph(VLM, H100, _staged(stages, turned=True), BATCH)
    rows = np.arange(1, straight.virtual_microbatches, 2)
    assert turned.forward[0][rows] == pytest.approx(straight.forward[0][rows][:, ::-1])
    assert turned.module("model").layers[1] == straight.module("model").layers[1][::-1]
    assert turned.module("model").reversed == (False, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s[:3], "multiple of the 4 ranks"),
        (lambda s: [*s[:3], [LayerRun("language", 14, head=True)]], "head of language must come after"),
        (lambda s: [[LayerRun("vision", 33)], *s[1:]], "0 stems"),
        (lambda s: [s[0], s[1], [LayerRun("language", 15, stem=True)], s[3]], "stem of language must come before"),
    ],
)
def test_incomplete_stages_are_refused(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=reason):
        build_graph(VLM, H100, _staged(change(_mixed())), BATCH)


def test_costs_override_the_fixed_numbers() -> None:
    costs = Costs(transfer_seconds=5e-3, static_bytes=(1e9, 2e9, 3e9, 4e9), memory_limit=50e9)
    graph = build_graph(VLM, H100, _cut(VLM, {}, {}), BATCH, costs=costs)
    assert set(graph.transfer) == {5e-3}
    assert graph.static_bytes.tolist() == [1e9, 2e9, 3e9, 4e9]
    assert set(graph.memory_limit) == {50e9}
    assert build_graph(VLM, H100, _cut(VLM, {}, {}), BATCH, memory_limit=[1e9] * 4).memory_limit.tolist() == [1e9] * 4
    with pytest.raises(ValueError, match="2 ranks in the costs"):
        build_graph(VLM, H100, _cut(VLM, {}, {}), BATCH, costs=Costs(static_bytes=(1.0, 2.0)))


def test_parallel_settings_count() -> None:
    def graph(**parallel: int | bool):  # type: ignore[no-untyped-def]
        model = VLM.with_parallel(**parallel)  # type: ignore[arg-type]
        return build_graph(model, H100, _cut(model, {}, {"vision": 12}), BATCH)

    base = graph()
    assert graph(sequence_parallel=False).activation[0].sum() > base.activation[0].sum()
    assert graph(sequence_parallel=False).transfer.sum() > base.transfer.sum()
    assert graph(dp=8).static_bytes.sum() < base.static_bytes.sum()
    assert graph(dp=8, distributed_optimizer=False).static_bytes.sum() == pytest.approx(base.static_bytes.sum())
    assert graph(tp=8).forward[0].sum() < base.forward[0].sum()
    assert (graph(pp=1).transfer == 0).all()


def test_several_encoders_feed_one_llm() -> None:
    batch = [Microbatch(1000, (169,) * 3, (150, 80)), Microbatch(1000, (), (200,)), Microbatch(1000)]
    graph = build_graph(THREE, H100, _cut(THREE, {}, {"vision": 2}), batch)
    by_module = [[u.module for u in graph.units if u.microbatch == m] for m in range(3)]
    assert by_module == [["vision", "vision", "audio", "language"], ["audio", "language"], ["language"]]


def test_equal_batches_give_equal_graphs_whatever_came_before() -> None:
    """Caches must not leak: a graph depends on its own arguments only."""
    partition = _cut(T2V, {"diffusion": 2}, {"diffusion": 1})
    batches = load_workload("t2v-mix", T2V, 3, 6, seed=2)
    fresh = priced_graph(CostModel(T2V, H100), partition, batches[2].microbatches)
    used = CostModel(T2V, H100)
    for b in batches[:2]:
        priced_graph(used, partition, b.microbatches)
    again = priced_graph(used, partition, batches[2].microbatches)
    assert np.array_equal(fresh.forward, again.forward)
    assert fresh.strategies == again.strategies


def test_misfits_are_refused() -> None:
    with pytest.raises(ModelError, match="the partition has"):
        build_graph(VLM, H100, _cut(T2V, {}, {}), BATCH)
    with pytest.raises(WorkloadError, match="at least one"):
        build_graph(VLM, H100, _cut(VLM, {}, {}), [])


def test_prompts_and_clips_are_priced_apart() -> None:
    short, long = (Microbatch(clips=(Clip(n, 64, 256, 256),)) for n in (20, 400))
    graph = build_graph(T2V, H100, _cut(T2V, {}, {}), [short, long])
    rows = {(graph.units[int(u)].module, graph.units[int(u)].microbatch): s for s, u in enumerate(graph.unit_of)}
    assert graph.forward[0, rows["language", 1]].sum() > graph.forward[0, rows["language", 0]].sum()
    # The DiT's tokens are the same; the longer prompt only adds to the cross attention.
    a, b = (graph.forward[0, rows["diffusion", m]].sum() for m in (0, 1))
    assert a < b < 1.1 * a


def _tapped(*layers: int) -> MultimodalModel:
    return replace(VLM, modules=(replace(VLM.modules[0], taps=layers), *VLM.modules[1:]))


def test_taps_are_work_where_their_layers_are() -> None:
    """Each costs a head's seconds on its layer's chunk, and nothing elsewhere."""
    plain, tapped = (build_graph(m, H100, _cut(VLM, {"vision": 2}, {}), BATCH[:1]) for m in (VLM, _tapped(0, 1)))
    more = (tapped.forward - plain.forward)[0]
    assert more[0, 0] > 0
    more[0, 0] = 0
    assert np.all(more == pytest.approx(0, abs=1e-12))
    one = build_graph(_tapped(0), H100, _cut(VLM, {"vision": 2}, {}), BATCH[:1])
    assert (tapped.forward - plain.forward)[0, 0, 0] == pytest.approx(2 * (one.forward - plain.forward)[0, 0, 0])
    assert _tapped(0, 1).parameters == VLM.parameters + 2 * VLM.modules[0].head.parameters(VLM.modules[0].layer.hidden)
    assert (tapped.static_bytes > plain.static_bytes).tolist() == [True] + [False] * (VLM.parallel.pp - 1)


def test_what_taps_made_travels_to_the_layers_that_need_it() -> None:
    """Through the encoder from its layer on, through the language model up to its own; not without images."""
    first, last = 0, VLM.modules[0].layers - 1
    cut = _cut(VLM, {"vision": 2, "language": 3}, {})
    plain = build_graph(VLM, H100, cut, BATCH[:2]).transfer
    early, late = (build_graph(_tapped(layer), H100, cut, BATCH[:2]).transfer - plain for layer in (first, last))
    vision, language = slice(0, 2), slice(2, 5)
    assert np.all(early[vision] > 0)
    assert late[vision].tolist() == pytest.approx([0, late[1]])
    assert 0 < late[1] < early[1]
    # Added behind the language model's first layer, which is on its first rank: nothing of it travels on.
    assert np.all(early[language] == 0)
    many = build_graph(_tapped(*range(12)), H100, cut, BATCH[:2]).transfer - plain
    assert many[2] > 0
    assert np.all(many[3:] == 0)


def test_taps_need_a_projector_and_layers_that_there_are() -> None:
    with pytest.raises(ModelError, match=r"modules.vision.taps: \(63,\), the layers are 0 to 62"):
        _tapped(63)
    with pytest.raises(ModelError, match="taps: each has a projector"):
        replace(VLM.modules[1], taps=(0,))
