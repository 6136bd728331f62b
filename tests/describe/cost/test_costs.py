"""The cost model: what it must say whatever the numbers are, and that measured ones win."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.strategies import parse_strategy, strategy_names
from dip_megatron.describe.cost import (
    Cluster,
    CostModel,
    Costs,
    LayerRun,
    Scale,
    Sizes,
    Table,
    load_cluster,
    whole_sizes,
)
from dip_megatron.describe.cost.static import state_bytes
from dip_megatron.describe.files import ConfigurationError, shipped
from dip_megatron.describe.model import LayerKind, ModuleShape, MultimodalModel, Parallel, TransformerLayer, load_model
from dip_megatron.describe.workload import Clip, Microbatch
from tests.drawn import settings

H100 = load_cluster("h100")
IDEAL = Cluster("ideal", 1e15, 80e9, 1e30, 1e30, 1e30, 1e30, 8, 0, 0, 0, 0, 2, True, ())
VLM, T2V = load_model("vlm-s"), load_model("t2v-s")
PRICERS = {"vlm": CostModel(VLM, H100), "t2v": CostModel(T2V, H100)}


def _images(count: int, tokens: int = 169) -> Sizes:
    return whole_sizes(VLM.module("vision"), [Microbatch(1, (tokens,) * count)])


def test_clusters_have_the_published_figures() -> None:
    assert {"h100", "h200", "b200", "h800", "h20", "cpu"} <= set(shipped("clusters"))
    for name in shipped("clusters"):
        assert load_cluster(name).name == name
    assert load_cluster("h800").node_bandwidth == 200e9
    h200, b200 = load_cluster("h200"), load_cluster("b200")
    assert (h200.flops, h200.memory_bytes, h200.memory_bandwidth) == (989.4e12, 141e9, 4.8e12)
    assert (b200.flops, b200.memory_bytes, b200.memory_bandwidth, b200.node_bandwidth) == (2.25e15, 180e9, 8e12, 9e11)
    assert (load_cluster("h20").flops, load_cluster("h20").memory_bytes) == (148e12, 96e9)


def test_on_ideal_hardware_only_the_products_count() -> None:
    """2 FLOPs a weight and token forward, as many for each gradient; attention 4 (and backward 10) a pair and
    channel."""
    model = load_model("vlm-s").with_parallel(tp=1, pp=1)
    pricer, shape = CostModel(model, IDEAL), model.module("language")
    batch = [Microbatch(8192, sequences=(5000, 3192))]
    layer = pricer.layer("language", whole_sizes(shape, batch))
    norms = 2 * shape.layer.hidden
    matmul = 2 * (shape.layer.parameters - norms) * 8192 / 1e15
    attention = 4 * (5000**2 + 3192**2) / 2 * shape.layer.hidden / 1e15
    none = strategy_names().index("none")
    assert layer.forward[none, 0] == pytest.approx(matmul + attention)
    assert layer.backward[none, 0] == pytest.approx(matmul + 2.5 * attention)
    assert layer.weight[none, 0] == pytest.approx(matmul)


def test_tensor_parallel_ranks_share_the_products() -> None:
    batch = [Microbatch(clips=(Clip(100, 128, 256, 256),))]
    seconds = []
    for tp in (1, 4):
        pricer = CostModel(T2V.with_parallel(tp=tp), IDEAL)
        sizes = whole_sizes(T2V.module("diffusion"), batch)
        seconds.append(pricer.layer("diffusion", sizes).forward[0, 0])
    assert seconds[0] == pytest.approx(4 * seconds[1])


def test_bytes_of_a_plain_layer_are_the_known_formula() -> None:
    """Korthikanti et al. (arXiv 2205.05198, section 4) count 34 bytes a token and channel: less 2 for dropout's masks,
    which multimodal training leaves out; attention's statistics (4 bytes a token and head) come on top."""
    hidden, tokens = 1024, 4096
    layer = TransformerLayer(hidden, 4 * hidden, 16, 16)
    module = ModuleShape("language", "text", 2, layer)
    model = MultimodalModel("plain", (module,), Parallel(tp=1, sequence_parallel=False))
    pricer = CostModel(model, H100)
    activation = pricer.layer("language", whole_sizes(module, [Microbatch(tokens)])).activation[0, 0]
    # Norm inputs and outputs 4 x 2, q, k, v and the attention's output 4 x 2, the MLP's two inner tensors 2 x 4 x 2.
    assert activation == pytest.approx(32 * hidden * tokens + 4 * 16 * tokens)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 47), st.integers(1, 40), st.integers(16, 700))
def test_more_work_costs_more(images: int, more: int, tokens: int) -> None:
    pricer = PRICERS["vlm"]
    chunk = (LayerRun("vision", 8, stem=True, head=True),)
    small = pricer.chunk_cost(chunk, {"vision": _images(images, tokens)})
    for larger in (_images(images + more, tokens), _images(images, tokens + more)):
        large = pricer.chunk_cost(chunk, {"vision": larger})
        for name in ("forward", "backward", "weight", "activation", "deferred_activation"):
            assert getattr(large, name)[0, 0] > getattr(small, name)[0, 0] * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 48))
def test_layers_add_up(first: int, second: int, images: int) -> None:
    pricer, sizes = PRICERS["vlm"], {"vision": _images(images)}
    parts = [pricer.chunk_cost((LayerRun("vision", n),), sizes) for n in (first, second, first + second)]
    for name in ("forward", "fused", "activation", "deferred_activation"):
        a, b, both = (getattr(p, name)[0, 0] for p in parts)
        assert a + b == pytest.approx(both)


def test_packed_sequences_attend_to_themselves_only() -> None:
    pricer, shape = PRICERS["vlm"], VLM.module("language")
    whole, packed = (
        pricer.layer("language", whole_sizes(shape, [Microbatch(8192, sequences=s)])).forward[0, 0]
        for s in ((), (2048,) * 4)
    )
    assert packed < whole


def test_windows_save_attention() -> None:
    layer = TransformerLayer(1024, 4096, 16, 16, window=64, full_attention_every=2)
    model = MultimodalModel("windowed", (ModuleShape("vision", "images", 4, layer),))
    pricer = CostModel(model, H100)
    sizes = {"vision": whole_sizes(model.modules[0], [Microbatch(1, (4096,))])}
    windowed, full = (pricer.layer("vision", sizes["vision"], LayerKind(f)).forward[0, 0] for f in (False, True))
    assert windowed < full
    chunk = pricer.chunk_cost((LayerRun("vision", 3, first=1),), sizes)  # layers 1, 2, 3: full, window, full
    assert chunk.forward[0, 0] == pytest.approx(2 * full + windowed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.lists(st.integers(1, 48), min_size=1, max_size=6), st.sampled_from(["h100", "h20"]))
def test_candidates_trade_seconds_for_bytes(layers: int, images: list[int], cluster: str) -> None:
    pricer = CostModel(VLM, load_cluster(cluster))
    sizes = whole_sizes(VLM.module("vision"), [Microbatch(1, (169,) * n) for n in images])
    cost = pricer.chunk_cost((LayerRun("vision", layers),), {"vision": sizes})
    seconds = cost.forward + cost.fused
    assert 1 <= len(seconds) <= 10
    assert (np.diff(seconds, axis=0) >= -1e-12).all()
    assert (cost.activation[-1] < cost.activation[0]).all()
    for u, names in enumerate(cost.names):
        assert names[0] == "none" or seconds[0, u] <= cost.forward[0, u] + cost.fused[0, u]
        assert len(names) == len(seconds)


def test_candidates_cost_what_their_names_say() -> None:
    pricer = PRICERS["vlm"]
    sizes = _images(12)
    layer = pricer.layer("vision", sizes)
    cost = pricer.chunk_cost((LayerRun("vision", 9),), {"vision": sizes})
    for c, name in enumerate(cost.names[0]):
        index = [strategy_names().index(s) for s in parse_strategy(name, 9)]
        assert cost.forward[c, 0] == pytest.approx(layer.forward[index, 0].sum())
        assert cost.backward[c, 0] == pytest.approx(layer.backward[index, 0].sum())
        assert cost.activation[c, 0] == pytest.approx(layer.activation[index, 0].sum())


def test_only_allowed_strategies_are_offered() -> None:
    sizes = {"vision": _images(12)}
    for allowed in ((), ("full",), ("mlp", "full")):
        cost = CostModel(VLM, load_cluster("h20"), strategies=allowed).chunk_cost((LayerRun("vision", 6),), sizes)
        used = {run.split(":")[0] for names in cost.names for name in names for run in name.split("+")}
        assert used <= {"none", *allowed}
    with pytest.raises(ValueError, match="sparse"):
        CostModel(VLM, H100, strategies=("sparse",))
    assert len(CostModel(VLM, H100, candidates=3).chunk_cost((LayerRun("vision", 6),), sizes).names[0]) == 3


def test_selective_recompute_pays_where_scores_are_kept() -> None:
    """Unfused attention keeps its score matrix: dropping it saves most of a long sequence's bytes."""
    cpu = CostModel(VLM, replace(H100, fused_attention=False))
    layer = cpu.layer("vision", _images(4))
    none, selective = (layer.activation[strategy_names().index(s), 0] for s in ("none", "selective"))
    assert selective < 0.7 * none


def test_static_bytes_count_eighteen_a_trained_weight() -> None:
    # bf16 weights, fp32 gradients, fp32 copy and two moments: 2 + 4 + 12 (Megatron-Core's mixed-precision Adam).
    whole = state_bytes(VLM.with_parallel(dp=4, distributed_optimizer=False), H100, 4e9, True)
    assert whole.total == 18 * 1e9
    sharded = state_bytes(VLM.with_parallel(dp=4), H100, 4e9, True)
    assert sharded.total == (2 + 4 + 12 / 4) * 1e9
    assert state_bytes(VLM, H100, 4e9, False).total == 2 * 1e9


def test_measured_tables_replace_the_formula() -> None:
    table = Table("vision", "layer", "forward", (2704.0, 27040.0), (1e-3, 9e-3))
    pricer = CostModel(VLM, H100, Costs(tables=(table,)))
    assert pricer.layer("vision", _images(1)).forward[0, 0] == pytest.approx(1e-3)
    assert pricer.layer("vision", _images(10)).forward[0, 0] == pytest.approx(9e-3)
    assert pricer.layer("vision", _images(20)).forward[0, 0] == pytest.approx(18e-3)  # beyond: in proportion
    full = strategy_names().index("full")
    layer = pricer.layer("vision", _images(1))
    assert layer.backward[full, 0] - layer.backward[0, 0] == pytest.approx(1e-3)  # recomputing takes the measured time
    other = pricer.layer("language", whole_sizes(VLM.module("language"), [Microbatch(100)]))
    plain = PRICERS["vlm"].layer("language", whole_sizes(VLM.module("language"), [Microbatch(100)]))
    assert np.array_equal(other.forward, plain.forward)


def test_scales_multiply_what_they_name() -> None:
    plain, sizes = PRICERS["vlm"].layer("vision", _images(3)), _images(3)
    scaled = CostModel(VLM, H100, Costs().scaled(2.0, module="vision", quantity="weight")).layer("vision", sizes)
    assert scaled.weight[0] == pytest.approx(2 * plain.weight[0])
    assert scaled.forward == pytest.approx(plain.forward)


def test_measured_efficiency_changes_the_operators() -> None:
    slow = CostModel(VLM, H100, Costs(efficiency=(("matmul", ((1.0, 0.1),)),)))
    assert slow.layer("vision", _images(3)).forward[0, 0] > 2 * PRICERS["vlm"].layer("vision", _images(3)).forward[0, 0]


def test_costs_survive_their_file(tmp_path: Path) -> None:
    costs = Costs(
        efficiency=(("collective", ((1e6, 0.2), (1e8, 0.7))), ("matmul", ((1e9, 0.5),))),
        tables=(
            Table("vision", "layer", "forward", (1.0, 2.0), (0.1, 0.2)),
            Table("vision", "layer", "deferred_activation", (1.0, 2.0), (5.0, 6.0)),
            Table("vision", "stem", "forward", (3.0,), (0.1,)),
        ),
        scales=(Scale("*", "layer", "backward", 1.25),),
        transfer_seconds=1e-4,
        static_bytes=(1.0, 2.0),
        memory_limit=3e9,
        device="NVIDIA H100",
    )
    path = tmp_path / "costs.json"
    costs.save(path)
    assert Costs.load(path) == costs
    assert Costs.load(path).device == "NVIDIA H100"


def test_costs_of_version_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    part = {"module": "vision", "part": "layer", "tokens": [1.0, 2.0], "hold": [5.0, 6.0]}
    data = {"version": 1, "measured": [part], "scale": [{"quantity": "hold", "factor": 2.0}], "hop_seconds": 1e-4}
    path.write_text(json.dumps(data))
    assert Costs.load(path) == Costs(
        tables=(Table("vision", "layer", "deferred_activation", (1.0, 2.0), (5.0, 6.0)),),
        scales=(Scale("*", "*", "deferred_activation", 2.0),),
        transfer_seconds=1e-4,
    )


@pytest.mark.parametrize(
    ("data", "place", "reason"),
    [
        ({"version": 3}, "version", "2"),
        ({"version": 1, "hop_seconds": 1.0, "transfer_seconds": 1.0}, "hop_seconds", "no such key"),
        ({"version": 1, "measured": 7}, "measured", "list"),
        ({"version": 2, "speed": 3}, "speed", "no such key"),
        ({"version": 2, "efficiency": {"matmul": [[5, 0.1], [4, 0.2]]}}, "top level", "sizes must rise"),
        ({"version": 2, "efficiency": {"matmul": [[5, 7.0]]}}, "top level", "efficiency"),
        ({"version": 2, "efficiency": {"conv": [[5, 0.7]]}}, "efficiency.conv", "matmul"),
        (
            {"version": 2, "measured": [{"module": "v", "part": "layer", "tokens": [1, 2], "forward": [1]}]},
            "measured.0",
            "1 values for 2 sizes",
        ),
        ({"version": 2, "measured": [{"module": "v", "part": "layer", "tokens": [2, 1]}]}, "measured.0", "rise"),
        ({"version": 2, "scale": [{"factor": 0}]}, "scale.0.factor", "greater than 0"),
    ],
)
def test_faults_in_costs_files_are_named(tmp_path: Path, data: dict, place: str, reason: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigurationError) as caught:
        Costs.load(path)
    assert "\n" not in str(caught.value)
    assert f"{path}: {place}" in str(caught.value)
    assert reason in str(caught.value)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="line 1: not JSON"):
        Costs.load(path)


def test_the_documented_file_can_be_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "cost-model.md").read_text(encoding="utf-8")
    path = tmp_path / "costs.json"
    path.write_text(text.split("```json\n")[1].split("```")[0])
    assert {t.quantity for t in Costs.load(path).tables} == {
        "forward",
        "backward",
        "weight",
        "activation",
        "deferred_activation",
    }


def test_measured_strategies_replace_derived_ones(tmp_path: Path) -> None:
    """Each strategy's seconds and bytes are its own table's where there is one, also after a round trip and a scale."""
    sizes = _images(4)
    tokens = float(sizes.tokens[0])
    measured = {"activation": 2.0, "selective": 3.0, "mlp": 4.0, "full": 5.0, "offload": 6.0,
                "offload_and_activation": 7.0, "offload_until_weight": 8.0,
                "offload_and_activation_until_weight": 9.0}  # fmt: skip
    tables = tuple(
        Table("vision", "layer", quantity, (tokens / 2, tokens * 2), (value / 2, value * 2), strategy)
        for strategy, value in measured.items()
        for quantity in ("forward", "backward", "activation")
        if (strategy, quantity) != ("mlp", "activation")
    )
    Costs(tables=tables).scaled(2.0, quantity="backward").save(tmp_path / "costs.json")
    loaded = Costs.load(tmp_path / "costs.json")
    assert loaded.tables == tables
    plain, priced = CostModel(VLM, H100).layer("vision", sizes), CostModel(VLM, H100, loaded).layer("vision", sizes)
    for row, strategy in enumerate(strategy_names()):
        value = measured.get(strategy)
        assert priced.forward[row, 0] == pytest.approx(plain.forward[row, 0] if value is None else value)
        assert priced.backward[row, 0] == pytest.approx(2 * (plain.backward[row, 0] if value is None else value))
    assert priced.activation[strategy_names().index("mlp"), 0] == plain.activation[strategy_names().index("mlp"), 0]
    assert priced.activation[strategy_names().index("full"), 0] == pytest.approx(5.0)
    assert priced.weight == pytest.approx(plain.weight)
    assert (CostModel(VLM, H100, loaded).layer("language", _images(4)).forward == PRICERS["vlm"].layer(
        "language", _images(4)).forward).all()  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"part": "head", "strategy": "full"}, "only a layer"),
        ({"strategy": "fool"}, "'fool' is not one of"),
        ({"strategy": "full", "weight": [1.0]}, "weight"),
    ],
)
def test_strategies_that_cannot_be_measured_are_refused(tmp_path: Path, entry: dict, complaint: str) -> None:
    path = tmp_path / "costs.json"
    line = {"module": "vision", "part": "layer", "tokens": [100.0], "forward": [1.0]} | entry
    path.write_text(json.dumps({"version": 2, "measured": [line]}))
    with pytest.raises(ConfigurationError, match=complaint):
        Costs.load(path)
