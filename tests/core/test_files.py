"""Plan files: exact round trips, and one line for every fault."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Payload, SearchStatistics, TensorSpec
from dip_megatron.core.files import PlanFileError, format_plan, parse_plan, read_plans, write_plans
from dip_megatron.core.format import plan_json_schema
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.optimus import optimus_coarse
from dip_megatron.schedulers.segmented import segmented_static
from tests.drawn import settings

from ..graphs import paper_graph, random_graph


def plan_of(seed: int, **fixed):
    graph = random_graph(seed, **{"memory": np.inf, **fixed})
    if seed % 2 == 0:
        graph = replace(graph, overhead=tuple(0.1 + rank / 3 for rank in range(graph.ranks)))
    return make_plan(
        graph, segmented_static(graph), lower_bound=0.0, name="segmented-static",
        search=SearchStatistics(0.1 + seed / 3, seed, 2, seed),
    )  # fmt: skip


ARRAYS = (
    "forward",
    "backward",
    "weight",
    "fused",
    "activation",
    "deferred_activation",
    "transfer",
    "static_bytes",
    "memory_limit",
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_plan_comes_back_exactly(seed):
    plan = plan_of(seed)
    line = format_plan(plan)
    back = parse_plan(line)
    assert format_plan(back) == line
    assert "\n" not in line
    assert (back.graph.modules, back.graph.units, back.graph.ranks) == (
        plan.graph.modules, plan.graph.units, plan.graph.ranks,
    )  # fmt: skip
    for name in ARRAYS:
        assert np.array_equal(getattr(back.graph, name), getattr(plan.graph, name))
    assert back.graph.strategies == plan.graph.strategies
    assert back.graph.overhead == plan.graph.overhead
    assert (back.actions, back.predicted, back.search, back.name) == (
        plan.actions, plan.predicted, plan.search, plan.name,
    )  # fmt: skip
    assert [o.tolist() for o in back.schedule.orders] == [o.tolist() for o in plan.schedule.orders]
    assert back.digest() == plan.digest()
    verify(back)


def test_limits_payloads_and_strategies_come_back(tmp_path):
    graph = paper_graph("vlm-s", microbatches=4)
    names = tuple(
        tuple(("none", "full:2", "full:4") for _ in range(graph.ranks)) for _ in range(graph.virtual_microbatches)
    )
    graph = replace(graph, strategies=names)
    schedule = optimus_coarse(graph)
    schedule = replace(schedule, strategy=(schedule.strategy + np.arange(graph.ranks) % 3).astype(np.int8))
    spec = (TensorSpec("hidden", (8192, 1, 4096), "bfloat16"), TensorSpec("timestep", (3,), "int64", False))
    payloads: dict[tuple[int, ...], Payload] = {
        (s, n): spec for s in range(graph.virtual_microbatches) for n in (s, *graph.next_virtual_microbatches[s])
    }
    plan = make_plan(graph, schedule, lower_bound=0.25, name="optimus", payloads=payloads)
    path = tmp_path / "plans.jsonl"
    write_plans(path, [plan, plan])
    path.write_text(path.read_text() + "\n")
    first, second = read_plans(path)
    assert first.payloads == payloads == second.payloads
    assert first.graph.strategies == plan.graph.strategies != ()
    assert first.graph.memory_limit.tolist() == graph.memory_limit.tolist()
    assert first.digest() == plan.digest()


def changed(edit) -> str:
    record = json.loads(format_plan(plan_of(7, ranks=2, microbatches=2)))
    edit(record)
    return json.dumps(record)


FAULTS = [
    (lambda r: r.pop("units"), "units: Field required"),
    (lambda r: r.update(colour="red"), "colour: no such key; there are version"),
    (lambda r: r.update({"two\nlines": 1}), "two lines: no such key"),
    (lambda r: r.update(version=9), "version: 9 is not supported"),
    (lambda r: r.update(ranks="2"), "ranks: Input should be a valid integer"),
    (lambda r: r.update(ranks=True), "ranks: Input should be a valid integer"),
    (lambda r: r.update(ranks=3), "durations[0].F: 2 entries for 3 ranks"),
    (lambda r: r["durations"].pop(), "durations: "),
    (lambda r: r["durations"][0].update(unit=1), "durations[0]: expected module"),
    (lambda r: r["durations"][0]["F"].append(1.0), "durations[0].F: 3 entries for 2 ranks"),
    (lambda r: r["durations"][0]["F"].__setitem__(1, -1.0), "durations[0].F[1]: Input should be greater than or equal"),
    (
        lambda r: r["activation_bytes"][1].update(activation=[1.0]),
        "activation_bytes[1].activation: 1 entries for 2",
    ),
    (lambda r: r["transfer"].append(0.0), "transfer: "),
    (lambda r: r["static_bytes"].pop(), "static_bytes: 1 entries for 2 ranks"),
    (lambda r: r["memory_limit"].append(None), "memory_limit: 3 entries for 2 ranks"),
    (lambda r: r["actions"].append([]), "actions: 3 entries for 2 ranks"),
    (lambda r: r["actions"][1].__setitem__(0, "dance"), "actions[1][0]: not an operation: 'dance'"),
    (lambda r: r["actions"][0].insert(0, "F:nowhere.0#0@0"), "actions[0][0]: F:nowhere.0#0@0 is not an operation"),
    (lambda r: r["actions"][0].insert(0, next(a for a in r["actions"][1] if " " not in a)), "actions[0][0]: "),
    (lambda r: r["units"][0].update(module="nowhere"), "units[0].module: no module is called 'nowhere'"),
    (lambda r: r["units"][1].update(id=0), "units[1].id: 0 stands at place 1"),
    (lambda r: r["units"][0].update(instances=[0]), "units[0].instances: "),
    (lambda r: r["units"][0].update(downstream=[99]), "modules, units: unit 0"),
    (lambda r: r["modules"][0].update(segments=9), "modules[0].layers: "),
    (lambda r: r["modules"][0].update(name="no name"), "modules[0].name: String should match"),
    (lambda r: r.update(overhead=[0.1]), "overhead: 1 entries for"),
    (lambda r: r["predicted"].update(bubble_ratio=1.5), "predicted.bubble_ratio: Input should be less"),
    (lambda r: r["predicted"].update(peak_bytes=[]), "predicted.peak_bytes: 0 entries for 2 ranks"),
    (lambda r: r["search"].pop("seed"), "search.seed: Field required"),
    (lambda r: r.update(payloads=[{"source": 0, "target": 0, "tensors": []}] * 2), "payloads[1]: 0 to 0 comes twice"),
]


def of_version_1(record: dict) -> dict:
    """The same line with the names of version 1."""
    record["version"], record["latency"] = 1, record.pop("transfer")
    for unit in record["units"]:
        unit["feeds"] = unit.pop("downstream")
    for stage in record["activation_bytes"]:
        stage["held"], stage["kept"] = stage.pop("activation"), stage.pop("deferred_activation")
    return record


def test_lines_of_version_1_are_read():
    line = format_plan(plan_of(7, ranks=2, microbatches=2))
    assert format_plan(parse_plan(json.dumps(of_version_1(json.loads(line))))) == line


@pytest.mark.parametrize(("name", "value"), [("version", True), ("version", 1.0), ("transfer", [])])
def test_half_a_version_1_is_refused(name, value):
    record = of_version_1(json.loads(format_plan(plan_of(7, ranks=2, microbatches=2))))
    with pytest.raises(PlanFileError, match=r"version|latency"):
        parse_plan(json.dumps(record | {name: value}))


@pytest.mark.parametrize(("edit", "message"), FAULTS)
def test_every_fault_is_one_line_with_its_place(edit, message, tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text(format_plan(plan_of(7, ranks=2, microbatches=2)) + "\n" + changed(edit) + "\n")
    reader = read_plans(path)
    next(reader)
    with pytest.raises(PlanFileError) as fault:
        next(reader)
    assert str(fault.value).startswith(f"{path}:2: ")
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: file: holds no plan"),
        ("{", "1: line: not JSON"),
        ("[1]", "1: line: expected an object, got list"),
        ('{"version": NaN}', "1: line: NaN"),
        ('{"ranks": 1, "ranks": 2}', "1: ranks: the field comes twice"),
        ("[" * 100000, "1: line: nested too deeply"),
        ('{"version": 1' + "0" * 5000 + "}", "1: line: nested too deeply or a number too long"),
        ("{}", "1: version: Field required"),
    ],
)
def test_what_is_no_plan_is_refused(text, message, tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text(text)
    with pytest.raises(PlanFileError) as fault:
        list(read_plans(path))
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(PlanFileError, match="No such file"):
        list(read_plans(tmp_path / "nowhere.jsonl"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not UTF-8"):
        list(read_plans(tmp_path / "binary"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_edit_of_a_number_or_a_key_escapes_as_another_error(data):
    """Whatever one changes in a line, it reads as a plan or raises PlanFileError."""
    record = json.loads(format_plan(plan_of(11, ranks=2, microbatches=1)))
    node, trail = record, []
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else data.draw(
            st.integers(0, len(node) - 1)
        )  # fmt: skip
        trail.append((node, key))
        node = node[key]
    parent, key = trail[data.draw(st.integers(0, len(trail) - 1))]
    parent[key] = data.draw(
        st.one_of(
            st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
            st.text(max_size=5), st.just([]), st.just({}), st.just([[1]]),
        )
    )  # fmt: skip
    try:
        plan = parse_plan(json.dumps(record))
    except PlanFileError:
        return
    assert parse_plan(format_plan(plan)).digest() == plan.digest()


def test_the_shipped_schema_is_the_readers():
    text = importlib.resources.files("dip_megatron.core").joinpath("plan.schema.json").read_text()
    shipped = json.loads(text)
    assert shipped == plan_json_schema()
    assert shipped["additionalProperties"] is False
    assert set(json.loads(format_plan(plan_of(3)))) == set(shipped["required"])
