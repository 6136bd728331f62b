"""Plans of a file, matched to batches by what these hold, and refused where they are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dip_megatron.core import TensorSpec
from dip_megatron.core.files import format_plan, write_plans
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import Training, load_model
from dip_megatron.describe.model.training import ChunkTraining, PartTraining
from dip_megatron.describe.workload import Microbatch, load_workload
from dip_megatron.planner.facade import Effort, Setting, make_planner
from dip_megatron.planner.from_file import FilePlanner, NoPlanError, PlanFile, fitted
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.planner.request import PlannerStatistics, PlanRequest

MODEL = load_model("vlm-s").with_parallel(pp=2)
BATCHES = [b.microbatches for b in load_workload("vlm-mix", MODEL, iterations=2, microbatches=3)]
SETTING = Setting(MODEL, load_cluster("h100"), load_workload("vlm-mix", MODEL, 2, 3), memory_limit=400e9)
PARTITION = paper_partition(MODEL, SETTING.cluster, SETTING.batches)


class Shapes:
    """As many numbers as the unit has instances."""

    def payload(self, unit, load, *, leaves_module):
        return (TensorSpec("hidden", (unit.count, load.tokens), "float32"),)


class Otherwise:
    """Takes what it is given."""

    def __init__(self):
        self.statistics, self.asked = PlannerStatistics(), []
        self.plans = {1: PlanSet((planned(BATCHES[0]),)), 2: PlanSet((planned(BATCHES[0], "segmented-static"),))}

    def submit(self, request):
        self.asked.append(request.request)

    def take(self, request, wait_seconds, ahead=None):
        return self.plans[request]

    def corrections(self, request):
        return None

    def close(self):
        pass


def planned(batch, schedule="dip"):
    effort = Effort(600.0, 1, 0, 60, True)
    return make_planner(schedule, SETTING, effort, PARTITION)(batch).plan()


def planner_of(tmp_path: Path, plans, otherwise=None, **more) -> FilePlanner:
    path = tmp_path / "plans.jsonl"
    write_plans(path, plans)
    return FilePlanner(PlanFile.read(path, 2), MODEL, Shapes(), otherwise or Otherwise(), **more)


def test_each_batch_gets_its_plan(tmp_path):
    plans = [planned(batch) for batch in BATCHES]
    planner = planner_of(tmp_path, plans)
    for request, i in ((1, 1), (2, 0), (3, 1)):
        planner.submit(PlanRequest(request, (BATCHES[i],), 0.0))
        (plan,) = planner.take(request, 0.0).plans
        verify(plan)
        assert replace(plan, payloads={}).digest() == plans[i].digest()
        assert plan.payloads
    assert planner.statistics.plans == 3
    assert PlanFile.read(tmp_path / "plans.jsonl", 2).partition(MODEL).modules[0].layers == PARTITION.modules[0].layers


def test_plans_for_one_batch_come_in_their_order(tmp_path):
    one, other = planned(BATCHES[0]), planned(BATCHES[0], "segmented-static")
    assert one.digest() != other.digest()
    planner = planner_of(tmp_path, [one, other])
    taken = []
    for request in range(3):
        planner.submit(PlanRequest(request, (BATCHES[0],), 0.0))
        (plan,) = planner.take(request, 0.0).plans
        taken.append(replace(plan, payloads={}).digest())
    assert taken == [one.digest(), other.digest(), one.digest()]


def test_a_plan_with_shapes_is_for_these_alone():
    (load, *rest) = BATCHES[0]
    plan = fitted(planned(BATCHES[0]), MODEL, BATCHES[0], Shapes())
    assert plan is not None
    assert fitted(plan, MODEL, BATCHES[0], Shapes()) is plan
    longer = (Microbatch(load.text_tokens + 1, load.images), *rest)
    assert fitted(plan, MODEL, longer, Shapes()) is None
    assert fitted(replace(plan, payloads={}), MODEL, longer, Shapes()) is not None
    more = (Microbatch(load.text_tokens, (*load.images, 169)), *rest)
    assert fitted(replace(plan, payloads={}), MODEL, more, Shapes()) is None
    assert fitted(plan, MODEL, rest, Shapes()) is None
    assert fitted(plan, MODEL, (*BATCHES[0], load), Shapes()) is None


def test_a_batch_without_a_plan(tmp_path):
    batch = (Microbatch(100, (169,)), Microbatch(90))
    otherwise = Otherwise()
    planner = planner_of(tmp_path, [planned(BATCHES[0])], otherwise)
    planner.submit(PlanRequest(1, (batch,), 0.0))
    with pytest.raises(NoPlanError, match=r"none of the 1 plans of .* is for a batch of 2 microbatches: tokens 269 90, "
                                          r"vision instances 1 0; give a --dip-schedule, too"):  # fmt: skip
        planner.take(1, 0.0)
    planner.submit(PlanRequest(2, (BATCHES[0],), 0.0, forward_only=True))
    assert planner.take(2, 0.0) is otherwise.plans[2]
    falls = planner_of(tmp_path, [planned(BATCHES[0])], otherwise, falls_back=True)
    falls.submit(PlanRequest(1, (batch,), 0.0))
    assert falls.take(1, 0.0) is otherwise.plans[1]


def test_plans_train_what_the_model_trains(tmp_path):
    planner = planner_of(tmp_path, [planned(BATCHES[0])])

    def training(frozen):
        return Training(
            tuple(
                (m.name, ((ChunkTraining(layers=PartTraining(int(m.name != frozen), 1)),) * 2,) * m.segments)
                for m in planner.file.modules
            )
        )

    planner.submit(PlanRequest(1, (BATCHES[0],), 0.0, training=training(None)))
    verify(*planner.take(1, 0.0).plans)
    planner.submit(PlanRequest(2, (BATCHES[0],), 0.0, training=training("vision")))
    with pytest.raises(NoPlanError, match="with the chunks that train in the model as built"):
        planner.take(2, 0.0)


def edited(tmp_path, change) -> Path:
    record = json.loads(format_plan(planned(BATCHES[0])))
    change(record)
    path = tmp_path / "edited.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return path


def swap(record):
    line = record["actions"][1]
    first = next(i for i, a in enumerate(line) if a.startswith(("B", "BW")))
    line.insert(0, line.pop(first))


def drop(record):
    record["actions"][0].pop(next(i for i, a in enumerate(record["actions"][0]) if a.startswith("F:language")))


def strategy(record):
    for line in record["actions"]:
        for i, action in enumerate(line):
            if ":vision.0#0@0" in action and ">" not in action:
                line[i] = action.split("{")[0] + "{full:99}"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (swap, r"edited.jsonl: plan 1: .*; nothing has run"),
        (drop, r"edited.jsonl: plan 1: rank 0: F:language.*is missing; nothing has run"),
        (strategy, r"edited.jsonl: plan 1: F:vision.0#0@0: "),
        (lambda record: record.pop("units"), r"edited.jsonl:1: units: Field required"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(tmp_path, change, fault):
    with pytest.raises(ConfigurationError, match=fault):
        PlanFile.read(edited(tmp_path, change), 2)


def test_other_chunks_are_refused(tmp_path):
    path = tmp_path / "plans.jsonl"
    write_plans(path, [planned(BATCHES[0])])
    with pytest.raises(ConfigurationError, match="plan 1 is for 2 pipeline ranks, this run has 4"):
        PlanFile.read(path, 4)
    file = PlanFile.read(path, 2)
    with pytest.raises(ConfigurationError, match=r"vision.upstream: the plans have \(\), this run has \('a',\)"):
        file.check((replace(file.modules[0], upstream=("a",)), file.modules[1]))
    file.check(file.modules)
    with pytest.raises(ConfigurationError, match="its plans have the modules vision, language, this run has model"):
        file.check((replace(file.modules[0], name="model"),))
    with pytest.raises(ConfigurationError, match=r"plans.jsonl: modules"):
        file.partition(load_model("t2v-s").with_parallel(pp=2))
