"""A model's parts, measured on microbatches of a loop: what ends up in a costs file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dip_megatron.cli import main
from dip_megatron.describe.cost import Costs, build_graph, load_cluster
from dip_megatron.describe.model import (
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    TokenEmbedding,
    TransformerLayer,
    even_partition,
)
from dip_megatron.describe.workload import Microbatch
from dip_megatron.profile.script import spread_out
from tests.processes import team

LENGTHS = (32, 64)


def gpt(ranks: int) -> MultimodalModel:
    layer = TransformerLayer(64, 128, 2, 2, causal=True)
    module = ModuleShape("language", "text", 4, layer, TokenEmbedding(128), LanguageHead(128))
    return MultimodalModel("gpt", (module,), Parallel(1, ranks, 1, False, False), Packing(max_tokens=max(LENGTHS)))


def profiled(rank: int, world: int) -> Costs:
    from dip_megatron.families.gpt.program import GptProgram
    from dip_megatron.profile.program import ProgramRun, profile_program
    from dip_megatron.runtime.protocol import MicrobatchInputs
    from dip_megatron.testing.synthetic import draw_text, draw_weights, gpt_arguments, gpt_forward_step, wrap
    from tests.runtime.llava_case import initialize

    initialize(1)
    model, device = gpt(1), torch.device("cpu")
    arguments = gpt_arguments(model, torch.float32)

    def build(layers: Any) -> Any:
        program = GptProgram(arguments, layers, rank=0)
        chunks = program.build_chunks()
        draw_weights(chunks, 0)
        return program, wrap(chunks, device)

    run, halved = (
        ProgramRun(build, model, load_cluster("cpu"), gpt_forward_step, device, halved=h) for h in (False, True)
    )
    inputs = []
    for length in LENGTHS:
        item = draw_text(length, arguments, device, 0)
        given = run.program.bind(item["tokens"], item["position_ids"], None, labels=item["labels"])
        inputs.append(MicrobatchInputs(given, [item]))
    return profile_program(run, halved, model, inputs, "cpu", repeats=1)


@pytest.fixture(scope="module")
def costs() -> Costs:
    (found,) = team(1).run(profiled)
    return found


def test_every_part_is_measured_at_every_size(costs: Costs) -> None:
    found = {(t.part, t.quantity): t for t in costs.tables}
    assert {quantity for part, quantity in found if part == "layer"} == {"forward", "backward", "weight", "activation"}
    assert {part for part, _ in found} | {"stage"} == {"stem", "layer", "head", "stage"}
    for table in found.values():
        assert table.tokens == tuple(map(float, LENGTHS))
        assert min(table.values) >= 0
    assert all(min(found["layer", quantity].values) > 0 for quantity in ("forward", "backward", "weight"))


def test_kept_bytes_are_those_that_autograd_saves(costs: Costs) -> None:
    """Of a layer of 64 channels: its input and normalised inputs, queries, keys, values and attention's output, both
    norms' results, and the inner width of 128 before and after the activation function; a few vectors beside them."""
    (layer,) = (t for t in costs.tables if (t.part, t.quantity) == ("layer", "activation"))
    few, many = layer.values
    assert many / few == pytest.approx(2, rel=0.02)
    channels = few / LENGTHS[0] / 4
    assert 8 * 64 + 2 * 128 <= channels <= 12 * 64 + 2 * 128 + 64


def test_graphs_are_priced_by_it(costs: Costs, tmp_path: Path) -> None:
    costs.save(tmp_path / "costs.json")
    loaded = Costs.load(tmp_path / "costs.json")
    cluster = load_cluster("cpu")
    graph = build_graph(gpt(2), cluster, even_partition(gpt(2)), [Microbatch(64, sequences=(64,))], costs=loaded)
    part: dict[tuple[str, str], float] = {(t.part, t.quantity): t.values[1] for t in costs.tables}

    def stage(end: str, quantity: str) -> float:
        return 2 * part["layer", quantity] + sum(part.get((name, quantity), 0.0) for name in (end, "stage"))

    between = cluster.between_operations
    assert graph.forward[0, 0, 0] == pytest.approx(stage("stem", "forward") + between)
    assert graph.fused[0, 0, 1] == pytest.approx(stage("head", "backward") + stage("head", "weight") + between)
    assert graph.overhead == (cluster.between_operations,) * 2


def test_microbatches_that_differ_are_measured() -> None:
    loads = [Microbatch(100 - 9 * n, (9,) * n) for n in (3, 0, 3, 7, 1, 0, 5, 2, 8)]
    assert [len(loads[i].images) for i in spread_out(loads, 4)] == [0, 2, 5, 8]
    assert spread_out(loads[:3]) == [1, 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "what to measure?"),
        (["--model", "vlm-s", "train.py"], "a SCRIPT's is measured as it is"),
        (["train.py", "--tensor-model-parallel-size", "2"], "one process can't measure"),
        (["nowhere.py"], "nowhere.py: no such script"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
