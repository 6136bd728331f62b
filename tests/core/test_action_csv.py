"""Orders as the CSV of actions of torch.distributed.pipelining: what goes out comes in, and torch reads it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_megatron.cli import main
from dip_megatron.core import ModalityModule, Unit
from dip_megatron.core.action_csv import ActionCsvError, format_actions, parse_actions, read_actions
from dip_megatron.core.files import read_plans
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.megatron import interleaved, one_forward_one_backward
from dip_megatron.schedulers.zero_bubble import zb_h1, zb_v
from tests.schedulers.mixed import mixed_graph

ORDERS = {
    "1f1b": (one_forward_one_backward, 1), "interleaved": (interleaved, 2), "zb-h1": (zb_h1, 1), "zb-v": (zb_v, 2),
}  # fmt: skip


def of(name: str, ranks: int, microbatches: int):
    order, segments = ORDERS[name]
    graph = mixed_graph(ranks, microbatches, segments, turned=name == "zb-v")
    return graph, order(graph)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(ORDERS)), st.integers(2, 4), st.integers(1, 3))
def test_orders_survive_the_way_out_and_in(name, ranks, rounds):
    graph, schedule = of(name, ranks, ranks * rounds)
    text = format_actions(graph, schedule)
    again = parse_actions(text, graph)
    assert all(np.array_equal(a, b) for a, b in zip(again.orders, schedule.orders, strict=True))
    assert format_actions(graph, again) == text


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_torch_reads_them(name, tmp_path):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    graph, schedule = of(name, 2, 4)
    path = tmp_path / "order.csv"
    path.write_text(format_actions(graph, schedule))
    runtime = object.__new__(schedules._PipelineScheduleRuntime)
    runtime.pipeline_order, runtime.pp_group_size = {}, 2
    runtime._num_stages, runtime._n_microbatches = 2 * ORDERS[name][1], 4
    runtime._stages, runtime.rank = [], 0
    schedules.PipelineScheduleMulti._load_csv(runtime, str(path))
    assert [[str(a) for a in line] for line in runtime.pipeline_order.values()] == [
        line.split(",") for line in path.read_text().splitlines()
    ]
    checked, order = read_actions(path)
    verify(make_plan(checked, order, lower_bound=0.0))


def test_torchs_own_schedule_comes_in():
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    graph, ours = of("1f1b", 2, 4)
    cells = ("0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3")
    theirs = [[str(schedules._Action.from_str(cell)) for cell in line.split()] for line in cells]
    text = "\n".join(",".join(line) for line in theirs)
    assert all(np.array_equal(a, b) for a, b in zip(parse_actions(text, graph).orders, ours.orders, strict=True))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0F0,0X0\n1F0,1B0", r"rank 0, action 1 \(0X0\): not a stage, one of F, B, I, W and a microbatch"),
        ("0F0,1B0\n1F0,0B0", r"rank 0, action 1 \(1B0\): stage 1 is on rank 1"),
        ("0F0,0B0\n1F0", r"rank 1: B:model.0#0@1 is missing"),
        ("0F0,0B0\n1F0,1F0,1B0", r"comes twice"),
        ("0F0,0F99999,0B0\n1F0,1B0", r"stages and microbatches are below"),
        ("0F0\n1F0\n2F0,3F0", r"4 stages on 3 ranks: must be a multiple"),
        ("", r"there is no action"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text, fault, tmp_path):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(ActionCsvError, match=fault):
        read_actions(path)


def test_what_the_format_cannot_say_is_named():
    graph, schedule = of("1f1b", 2, 2)
    frozen = replace(graph, modules=(ModalityModule("model", ((1, 1),), trainable=((False, True),)),))
    with pytest.raises(ActionCsvError, match=r"F:model.0#0@0 has no backward: the CSV has one for every stage"):
        format_actions(frozen, schedule)
    parts = replace(graph, units=(Unit(0, "model", 0), Unit(1, "model", 0)))
    with pytest.raises(ActionCsvError, match="has several units of model: the CSV knows whole microbatches"):
        format_actions(parts, schedule)
    skipped = replace(graph, units=(Unit(0, "model", 0), Unit(1, "model", 2)))
    with pytest.raises(ActionCsvError, match="microbatch 1 has nothing for model: in the CSV it passes every stage"):
        format_actions(skipped, schedule)


def test_a_command_takes_and_gives_them(tmp_path, capsys):
    setting = ["--model", "vlm-s", "--cluster", "h100", "--workload", "vlm-mix", "--iterations", "1", "--pp", "2",
               "--microbatches", "4", "--schedule", "megatron-1f1b", "--memory-gb", "400"]  # fmt: skip
    out, first, second = tmp_path / "order.csv", tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *setting, "--csv", str(out), "-o", str(first)])
    with pytest.raises(SystemExit, match="0"):
        main(["check", str(out)])
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *setting, "--orders", str(out), "-o", str(second)])
    digests = [[plan.digest() for plan in read_plans(path)] for path in (first, second)]
    assert digests[0] == digests[1]
    out.write_text(out.read_text().replace("1F0", "1F7", 1))
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *setting, "--orders", str(out)])
    assert "there are 2 stages and 4 microbatches" in capsys.readouterr().err
    out.write_text("0B0,0F0\n1F0,1B0\n")
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(out)])
