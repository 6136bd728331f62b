"""Every schedule of the registry trains, with Megatron's losses and gradients; a plan file trains like the run that
wrote it; what can't run says why in one line before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dip_megatron.core.files import format_plan, read_plans
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.registry import find_schedule, schedule_names
from examples.llava_digits.runs import RunFailed
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import Log, run

pytestmark = [on_cpu_ranks, needs_megatron_training]
ITERATIONS = 2
CUT = {"cut": True}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """1F1B on two stages, ViT on the first."""
    return run(tmp_path_factory.mktemp("megatron"), dip=False, options=CUT, iterations=ITERATIONS)


def assert_equal(ours: Log, megatrons: Log) -> None:
    assert sorted(ours.losses) == list(range(1, ITERATIONS + 1))
    assert ours.losses == pytest.approx(megatrons.losses, rel=1e-5)
    assert ours.norms == pytest.approx(megatrons.norms, abs=2e-3)  # printed with three digits


@pytest.mark.parametrize("name", [n for n in schedule_names() if n != "dip"])
def test_every_schedule_trains_with_megatrons_gradients(name: str, megatron: Log, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    log = run(
        tmp_path / "run", "--dip-schedule", name, "--dip-trace-dir", str(trace), "--dip-trace-plans", options=CUT,
        iterations=ITERATIONS,
    )  # fmt: skip
    assert_equal(log, megatron)
    plans = list(read_plans(trace / "plans.jsonl"))
    assert len(plans) == ITERATIONS
    mixed = find_schedule(name).mixed
    for plan in plans:
        verify(plan)
        assert [m.name for m in plan.graph.modules] == (["model"] if mixed else ["vision", "language"])
        assert any(plan.graph.modules[0].reversed) == (mixed is not None and mixed.turned)
    asked = [plan.name for plan in plans]
    if find_schedule(name).searches:
        assert set(asked) <= {name, "greedy"}  # the first, and on a busy machine whatever comes late
    else:
        assert asked == [name] * ITERATIONS
    if mixed:  # and the same again from what was written, to the last bit
        again = run(tmp_path / "again", "--dip-schedule", "off", "--dip-plan-file", str(trace), options=CUT,
                    iterations=ITERATIONS)  # fmt: skip
        assert exact(again) == exact(log)


def exact(log: Log) -> list[tuple[int, int, float]]:
    """Every loss to its last bit: those of later iterations hang on the gradients of the earlier ones."""
    found = sorted((s["iteration"], s["index"], s["loss"]) for rank in log.samples for s in rank if s["train"])
    assert len(found) == ITERATIONS * 4
    return found


def test_a_run_repeats_from_its_plans(tmp_path: Path) -> None:
    """Bit for bit, under plans that were searched with other times; edited and missing plans are refused."""
    trace, written = tmp_path / "trace", tmp_path / "plans.jsonl"
    first = run(
        tmp_path / "first", "--dip-trace-dir", str(trace), "--dip-trace-plans",
        options=CUT, iterations=ITERATIONS,
    )  # fmt: skip
    plans = list(read_plans(trace / "plans.jsonl"))
    written.write_text("".join(format_plan(plan) + "\n" for plan in plans))
    again = run(
        tmp_path / "again", "--dip-schedule", "off", "--dip-plan-file", str(written), "--dip-trace-dir",
        str(tmp_path / "trace2"), "--dip-trace-plans", options=CUT, iterations=ITERATIONS,
    )  # fmt: skip
    assert exact(again) == exact(first)
    repeated = list(read_plans(tmp_path / "trace2" / "plans.jsonl"))
    assert [p.digest() for p in repeated] == [p.digest() for p in plans]

    # A plan less: the batch without one ends the run, by its iteration and what it holds.
    missing = tmp_path / "missing.jsonl"
    missing.write_text(format_plan(plans[0]) + "\n")
    with pytest.raises(RunFailed):
        run(tmp_path / "refused", "--dip-schedule", "off", "--dip-plan-file", str(missing), options=CUT,
            iterations=ITERATIONS)  # fmt: skip
    said = (tmp_path / "refused" / "run.rank0.log").read_text()
    wanted = (
        r"no plan for iteration 2: NoPlanError: none of the 1 plans of .*missing.jsonl is for a batch of 4 "
        r"microbatches: tokens [\d ]+, vision instances [\d ]+; give a --dip-schedule, too"
    )
    assert re.search(wanted, said)

    # With a schedule it is planned instead.
    fallen = run(tmp_path / "fallen", "--dip-schedule", "static", "--dip-plan-file", str(missing), options=CUT,
                 iterations=ITERATIONS)  # fmt: skip
    assert fallen.losses == pytest.approx(first.losses, rel=1e-5)

    # An operation out of place, before anything is built.
    record = json.loads(format_plan(plans[0]))
    line = record["actions"][1]
    place = next(i for i, action in enumerate(line) if action.startswith("B"))
    record["actions"][1] = [line[place], *line[:place], *line[place + 1 :]]
    edited = tmp_path / "edited.jsonl"
    edited.write_text(json.dumps(record) + "\n")
    with pytest.raises(RunFailed):
        run(tmp_path / "edited", "--dip-schedule", "off", "--dip-plan-file", str(edited), options=CUT, iterations=1)
    said = (tmp_path / "edited" / "run.rank0.log").read_text()
    assert re.search(r"dip: .*edited.jsonl: plan 1: rank 1.*; nothing has run", said)


def test_layers_of_mixed_chunks_can_be_given(megatron: Log, tmp_path: Path) -> None:
    """ZB-V with a ViT on three of four stages; evaluation, where the loss is not on the last rank."""
    config = tmp_path / "dip.yaml"
    config.write_text(yaml.safe_dump({"modules": {
        "vision": {"layers": [[1, 0], [0, 1]]}, "language": {"layers": [[0, 0], [1, 1]]},
    }}))  # fmt: skip
    with pytest.raises(RunFailed):
        run(tmp_path / "refused", "--dip-schedule", "zb-v", "--dip-config", str(config), options=CUT, iterations=1)
    said = (tmp_path / "refused" / "run.rank0.log").read_text()
    assert "dip: --dip-config: zb-v: " in said


def test_a_model_that_a_schedule_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed):
        run(tmp_path, "--dip-schedule", "nosuch", options=CUT, iterations=1)
    said = (tmp_path / "run.rank0.log").read_text()
    assert "dip: flags: schedule: unknown schedule 'nosuch'; choose one of dynamic, static, dip, dip-paper" in said
