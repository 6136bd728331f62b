"""scripts/reproduce_paper on tiny budgets: parts run, say where numbers come from, and judge honestly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.paper import cases, large_scale, main, throughput
from benchmarks.paper.exact import solve_orders
from benchmarks.paper.flops import model_flops
from benchmarks.paper.memory import fluctuation, timeline
from benchmarks.paper.record import Bar, Comparison, Result
from benchmarks.paper.search_time import in_ticks
from dip_megatron.core.simulate import simulate
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import describe
from dip_megatron.schedulers.dip.engine import search
from dip_megatron.schedulers.segmented import segmented_static
from tests.graphs import random_graph
from tests.patience import LONG


@pytest.fixture
def tiny(monkeypatch, tmp_path, capsys):
    """Run parts by name on the smallest budget; what they printed and saved."""
    monkeypatch.setattr(main, "QUICK", cases.TINY)

    def run(only: str):
        status = main.main(["--quick", "--only", only, "--out", str(tmp_path / "out")])
        return status, capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text()), tmp_path

    return run


def test_parts_print_and_save_what_they_found(tiny):
    status, text, saved, folder = tiny("ablation,unit-size,search")
    assert status == (1 if "MISSED" in text else 0)
    assert list(saved["parts"]) == ["ablation", "unit-size", "search"]
    for part in saved["parts"].values():
        assert set(part["numbers"]) <= {"quoted", "simulated", "measured"}
        assert (folder / "out" / part["figure"]).stat().st_size > 1000
    seconds = saved["parts"]["ablation"]["numbers"]["simulated"]["seconds"]
    assert list(seconds)[:5] == list(saved["parts"]["ablation"]["numbers"]["quoted"]["seconds"])
    # The tree search starts from the natural order, and starts from the leanest strategies when it may change them.
    assert seconds["+ reordering"] <= seconds["+ interleaving"]
    assert seconds["+ memory"] <= seconds["+ interleaving"]
    for row in ("+ partitioner", "+ memory"):
        assert f"{seconds[row]:.3f}" in text


def test_throughput_and_large_models_on_one_model_each(tmp_path):
    result = throughput.run(cases.TINY, tmp_path, ("t2v-s",))
    assert isinstance(result, Result)
    seconds = result.data["simulated"]["seconds"]["t2v-s"]
    gain = seconds[throughput.WEAK] / seconds["dip"]
    least = next(b for b in result.bars if "least gain" in b.name)
    assert least.value == pytest.approx(gain)
    assert least.met == (gain >= least.target)
    # Of all numbers of segments, the baseline has the best.
    by_segments = result.data["simulated"]["parameter_balanced_seconds"]["t2v-s"]
    assert min(by_segments.values()) == pytest.approx(seconds[throughput.WEAK])
    large = large_scale.run(cases.TINY, tmp_path, (("t2v-xl", 4, 96),))
    (mfu,) = large.data["simulated"]["mfu"].values()
    (ideal,) = large.data["simulated"]["mfu_without_bubbles"].values()
    assert all(0 < m <= ideal * 1.001 for m in mfu.values())


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--only", "ablations"])
    assert ended.value.code == 2
    assert "choose from throughput, ablation" in capsys.readouterr().err


def test_a_difference_of_more_than_a_tenth_is_explained():
    near, far = (Comparison("x", 10.0, ours, "because") for ours in (10.9, 11.1))
    assert "because" not in "".join(near.lines())
    assert "because" in "".join(far.lines())
    assert "reason" not in near.data()
    assert far.data() == {"name": "x", "quoted": 10.0, "simulated": 11.1, "unit": "", "reason": "because"}


def test_bars_are_met_from_their_target_on():
    assert Bar("gain", 1.5, 1.5).met
    assert not Bar("gain", 1.49, 1.5).met
    assert Bar("seconds", 9.0, 10.0, at_most=True).met
    assert Bar("gain", 1.0, 1.5, why="little to gain").data()["why"] == "little to gain"


def test_model_flops_are_six_per_weight_and_token_and_attention():
    model = load_model("vlm-s")
    batch = load_workload("vlm-mix", model, 1, 4, 0)[0].microbatches
    vision, language = model.modules
    patches = sum(sum(m.images) for m in batch) * vision.reduction
    tokens = sum(m.tokens for m in batch)
    weights = 6 * (
        vision.layers * vision.layer.parameters * patches + language.layers * language.layer.parameters * tokens
    )
    head = 6 * 128256 * 4096 * tokens
    assert weights + head < model_flops(model, batch) < 1.35 * (weights + head)
    assert model_flops(model, batch * 2) == pytest.approx(2 * model_flops(model, batch))


@pytest.mark.parametrize("seed", range(4))
def test_memory_timelines_are_the_simulators(seed):
    graph = random_graph(seed, ranks=3, microbatches=4)
    schedule = segmented_static(graph)
    planned = describe(graph, schedule, "x", 0.0)
    peaks = simulate(graph, schedule).peak_bytes
    for rank in range(graph.ranks):
        line = timeline(planned, rank)
        assert max(size for _, size in line) == pytest.approx(peaks[rank])
        assert line[-1][1] == pytest.approx(graph.static_bytes[rank])


def test_fluctuation_counts_time_between_the_first_and_the_last_backward():
    # Up to 3, then 1 second at 2 and 3 seconds at 4, then the end, which doesn't count.
    line = [(0.0, 0.0), (0.0, 3.0), (5.0, 2.0), (6.0, 4.0), (9.0, 5.0), (10.0, 0.0)]
    assert fluctuation(line) == pytest.approx(np.sqrt(0.25 * 1.5**2 + 0.75 * 0.5**2))


@pytest.mark.parametrize("seed", range(3))
def test_the_solver_is_never_slower_than_the_search_once_it_has_proved(seed):
    graph = random_graph(seed, ranks=2, microbatches=2, max_units=1)
    graph = in_ticks(graph.project(np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8)))
    solved = solve_orders(graph, 1e-3, LONG, workers=1)
    assert solved.optimal
    free = replace(graph, memory_limit=np.full(graph.ranks, 1e18))
    found = search(free, schedule="dip-paper", budget_seconds=60.0, evaluations=200)
    assert solved.time <= found.iteration_time + 1e-9
    assert solved.time >= found.lower_bound - 1e-9
