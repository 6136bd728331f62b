"""Files that carry sets of plans, and ``dip check`` on them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.commands.check import check
from dip_megatron.core.experts import Coupled, ExpertLayers
from dip_megatron.core.files import PlanFileError, format_plan, parse_plan, plan_sets_of, read_plans, write_plans
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.planner.from_file import PlanFile
from tests.core.joint.drawn_sets import BW, F, drawn_set
from tests.core.joint.test_verify import two_replicas
from tests.drawn import settings


def planned(seed: int) -> PlanSet:
    drawn = drawn_set(seed)
    return make_plan_set(drawn.graphs, drawn.schedules, drawn.experts, lower_bound=0.0)


@settings(30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_lines_of_a_set_come_back(seed):
    for plan in planned(seed).plans:
        line = format_plan(plan)
        again = parse_plan(line)
        assert again.coupled == plan.coupled
        assert again.digest() == plan.digest()
        assert format_plan(again) == line


def test_a_plan_by_itself_says_nothing_of_sets():
    assert "coupled" not in json.loads(format_plan(replace(planned(1).plans[0], coupled=None)))


def test_sets_of_a_file(tmp_path):
    file = tmp_path / "sets.jsonl"
    sets = [planned(1), planned(2)]
    write_plans(file, [plan for s in sets for plan in s.plans])
    assert [s.digest() for s in plan_sets_of(read_plans(file), file)] == [s.digest() for s in sets]
    result = CliRunner().invoke(check, [str(file)])
    count = sum(len(s.plans) for s in sets)
    assert (result.exit_code, result.output) == (0, f"{file}: {count} plans, no fault\n")


def test_check_names_the_pair_that_breaks_a_set(tmp_path):
    """Each plan is fine by itself."""
    file = tmp_path / "sets.jsonl"
    joint = two_replicas([[[(F, 0), (F, 1), (BW, 0), (BW, 1)]], [[(F, 0), (BW, 0), (F, 1), (BW, 1)]]])
    write_plans(file, (*planned(4).plans, *joint.plans))
    result = CliRunner().invoke(check, [str(file)])
    first = 1 + len(planned(4).plans)
    assert result.exit_code == 1
    assert result.output.startswith(
        f"{file}: plans {first} to {first + 1}: pipeline rank 0, event 1: replica 0 runs F:text.0#1@0 where replica 1 "
        "runs BW:text.0#0@0"
    )
    strangers = Coupled(1, 2, ExpertLayers(()))
    write_plans(file, (joint.plans[0], replace(joint.plans[1], coupled=strangers)))
    result = CliRunner().invoke(check, [str(file)])
    assert (result.exit_code, result.output) == (
        1, f"{file}: plans 1 to 2: replica 1 has experts in other layers than replica 0\n"
    )  # fmt: skip


def test_check_compares_what_a_set_predicts(tmp_path):
    file = tmp_path / "sets.jsonl"
    plans = list(planned(4).plans)
    plans[-1] = replace(plans[-1], predicted=replace(plans[-1].predicted, iteration_time=1e9))
    write_plans(file, plans)
    result = CliRunner().invoke(check, [str(file)])
    assert result.exit_code == 1
    assert f"replica {len(plans) - 1}: predicted.iteration_time is 1000000000.0" in result.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[1:], "plan 1: coupled: replica 1 of"),
        (lambda lines: lines[:-1], "of a set of"),
        (lambda lines: [lines[0], *lines], "plan 2: coupled: replica 0 of"),
    ],
)
def test_incomplete_sets_are_malformed(tmp_path, change, reason):
    file = tmp_path / "sets.jsonl"
    lines = [format_plan(p) for p in planned(4).plans]
    file.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    with pytest.raises(PlanFileError, match=reason):
        list(plan_sets_of(read_plans(file), file))
    result = CliRunner().invoke(check, [str(file)])
    assert result.exit_code == 2
    assert reason in result.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"replica": 9}, "coupled.replica: 9 of"),
        ({"experts": {"audio": [[[True]]]}}, "coupled.experts: expert layers of 'audio'"),
        ({"members": 3}, "coupled.members"),
    ],
)
def test_wrong_fields_are_named(change, reason):
    record = json.loads(format_plan(planned(4).plans[0]))
    record["coupled"] |= change
    with pytest.raises(PlanFileError, match=reason):
        parse_plan(json.dumps(record))


def test_a_plan_of_a_set_runs_nowhere_alone(tmp_path):
    file = tmp_path / "sets.jsonl"
    plans = planned(4).plans
    write_plans(file, plans)
    with pytest.raises(ConfigurationError, match="share experts and can't run alone"):
        PlanFile.read(file, plans[0].graph.ranks)
    assert len(list(read_plans(file))) == len(plans)
