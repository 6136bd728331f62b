"""Prices of encoders that tensor-parallel ranks hold whole: all instances on each, or a share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.core.strategies import strategy_names
from dip_megatron.describe.cost import (
    Cluster,
    CostModel,
    LayerRun,
    build_graph,
    unit_sizes,
    whole_sizes,
)
from dip_megatron.describe.model import (
    ModelError,
    ModulePartition,
    MultimodalModel,
    Partition,
    TensorParallel,
    even_partition,
    load_model,
)
from dip_megatron.describe.workload import Microbatch

IDEAL = Cluster("ideal", 1e15, 80e9, 1e30, 1e30, 1e30, 1e30, 8, 0, 0, 0, 0, 2, True, ())
NONE = strategy_names().index("none")
BATCH = (Microbatch(500, (169, 400, 169, 169, 300, 91), sequences=(1798,)), Microbatch(300, (256,) * 4))


def vlm(how: TensorParallel, tp: int = 4) -> MultimodalModel:
    """VLM-S, whose encoder is held as said."""
    model = load_model("vlm-s").with_parallel(tp=tp)
    return replace(model, modules=(replace(model.modules[0], tensor_parallel=how), *model.modules[1:]))


def test_a_rank_works_on_the_largest_share():
    """On hardware that is slow in nothing but products: as one rank does alone, with so many tokens."""
    shape = vlm("shared").module("vision")
    share = unit_sizes(shape, BATCH, [(0, 0, 6), (1, 0, 4), (0, 1, 2)], shape.sharing(vlm("shared").parallel))
    assert share.outputs.tolist() == [400, 256, 400]  # of 169 | 400 | 338 | 391, four, and two ranks
    assert share.tokens.tolist() == [out * shape.reduction for out in share.outputs]
    for part in ("stem", "head"):
        of = [getattr(CostModel(vlm(how), IDEAL), part)("vision", share) for how in ("shared", "whole")]
        alone = getattr(CostModel(vlm("split", tp=1), IDEAL), part)("vision", share)
        assert all(np.array_equal(one.forward, alone.forward) for one in of)
    layer = CostModel(vlm("shared"), IDEAL).layer("vision", share)
    alone = CostModel(vlm("split", tp=1), IDEAL).layer("vision", share)
    assert np.array_equal(layer.forward, alone.forward)
    assert np.array_equal(layer.activation, alone.activation)


def test_what_shares_have_become_is_gathered():
    """Each rank gets what the three others of a node have made, and hands all of it on."""
    slow = replace(IDEAL, node_bandwidth=1e9)
    shape = vlm("shared").module("vision")
    share = unit_sizes(shape, BATCH, [(1, 0, 4)], 4)
    shared, whole = (CostModel(vlm(how), slow).head("vision", share) for how in ("shared", "whole"))
    made = 256 * shape.output_width * 2
    assert shared.forward - whole.forward == pytest.approx(3 * made / 1e9)
    assert np.array_equal(shared.backward, whole.backward)


def test_context_parallel_ranks_have_a_share_of_split_encoders():
    """Each tensor-parallel rank still has its part of every matrix; what is gathered comes over the network."""
    slow = replace(IDEAL, gpus_per_node=4, network_bandwidth=1e8)
    alone = vlm("split", tp=2)
    shared = alone.with_parallel(cp=4)
    vision = replace(shared.modules[0], context_parallel="shared")
    shared = replace(shared, modules=(vision, *shared.modules[1:]))
    share = unit_sizes(vision, BATCH, [(1, 0, 4)], vision.sharing(shared.parallel))
    assert share.outputs.tolist() == [256]
    ours, theirs = CostModel(shared, slow), CostModel(alone, slow)
    assert np.array_equal(ours.layer("vision", share).forward, theirs.layer("vision", share).forward)
    made = 256 * vision.output_width * 2
    assert ours.head("vision", share).forward - theirs.head("vision", share).forward == pytest.approx(3 * made / 1e8)
    run = ((LayerRun("vision", 63, stem=True, head=True),),)
    sizes = {m.name: whole_sizes(m, BATCH) for m in alone.modules}
    assert ours.static([run], sizes)[0].parameters == theirs.static([run], sizes)[0].parameters


def test_equal_instances_take_each_rank_its_part_of_the_time():
    partition = even_partition(vlm("whole"), {"vision": 2}, {"vision": 4})
    graphs = {how: build_graph(vlm(how), IDEAL, partition, BATCH[1:]) for how in ("whole", "shared")}
    first = graphs["whole"].unit_of == 0
    assert first.sum() == 2
    for name in ("forward", "fused", "activation"):
        whole, shared = (getattr(graphs[how], name)[0][first].sum() for how in ("whole", "shared"))
        # Attention is within images, so that all of the work is shared out.
        assert shared == pytest.approx(whole / 4, rel=1e-6)


def test_what_a_rank_holds_is_not_split():
    run = (LayerRun("vision", 63, stem=True, head=True),)
    held = {}
    for how in ("split", "whole", "shared"):
        model = vlm(how)
        sizes = {m.name: whole_sizes(m, BATCH) for m in model.modules}
        (held[how],) = CostModel(model, IDEAL).static([[run]], sizes)
    for what in ("parameters", "gradients", "optimizer"):
        split, whole, shared = (getattr(held[how], what) for how in ("split", "whole", "shared"))
        assert whole == shared == pytest.approx(4 * split)


def test_chunks_of_several_modalities_run_as_megatrons_do():
    """All instances on every rank."""
    runs = [[LayerRun("vision", 63, stem=True, head=True)], [LayerRun("language", 32, stem=True, head=True)]]
    graphs = []
    for how in ("whole", "shared"):
        model = vlm(how).with_parallel(pp=2)
        graphs.append(build_graph(model, IDEAL, Partition((ModulePartition.of_stages(runs, 2),)), BATCH))
    assert np.array_equal(graphs[0].forward, graphs[1].forward)


def test_heads_need_not_divide_what_is_not_split():
    """Of 63 layers' 16 heads none is split; the language model's are, in the line that refuses."""
    model = vlm("shared", tp=1)
    with pytest.raises(ModelError, match=r"modules\.language\.layer\.heads: 32 can't be split over tp 3"):
        model.with_parallel(tp=3)
    with pytest.raises(ModelError, match=r"modules\.vision\.layer\.heads: 16 can't be split over tp 3"):
        vlm("split", tp=1).with_parallel(tp=3)


def test_only_instances_can_be_shared_out():
    language = load_model("vlm-s").module("language")
    with pytest.raises(ModelError, match=r"modules\.language\.tensor_parallel: .*; leave it out"):
        replace(language, tensor_parallel="shared")
    with pytest.raises(ModelError, match=r"modules\.language\.context_parallel: .*; leave it out"):
        replace(language, context_parallel="shared")
