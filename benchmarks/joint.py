"""What coupling costs, and what joint plans, pairing and an exchange mend. Simulated.

    scripts/bench joint [--quick] [--models vlm-s,...] [--replicas 32] [--group 8] [--batches 1] [--deep]
        [--json FILE]

Replicas draw batches of 16 microbatches of the model's published mix (H100, the shipped partition, which was chosen on
other batches). All layers of the language model are taken for mixtures of experts whose group spans ``--group``
replicas: these meet in every stage with such layers, which begins when all are there and lasts as long as the longest.
Times are those of the slowest group, over the slowest replica of independent plans after the exchange of
``--dip-balance swap`` (what the same batches would take without coupling). Every schedule runs under the same
synchronisation: in the order in which microbatches come, paired (each replica gives its microbatches longest first),
and after an exchange that makes the slots of a group alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.replicas import COUNT, Case, Seconds
from dip_megatron.core import ModalityModule, OperationGraph, Schedule
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.graph import Floats
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import Cluster, cost_model, load_cluster, priced_graph
from dip_megatron.describe.model import MultimodalModel, Partition, load_model
from dip_megatron.describe.workload import Microbatch, load_workload
from dip_megatron.planner.balance import Work, assign, microbatch_work
from dip_megatron.planner.coupled_balance import CoupledAssignment, CoupledWork, assign_coupled
from dip_megatron.planner.model_graphs import pricer as price_model
from dip_megatron.planner.partitioning import choose_partition, paper_partition
from dip_megatron.report.schedules import text_table
from dip_megatron.schedulers.common import BaselineError
from dip_megatron.schedulers.dip.engine import search, warm_up
from dip_megatron.schedulers.entry import Effort
from dip_megatron.schedulers.joint import JointFound, Slots, as_they_come, dip_pairing, search_joint
from dip_megatron.schedulers.joint.others import mixed_experts, schedule_together
from dip_megatron.schedulers.registry import find_schedule
from dip_megatron.schedulers.static import tune_static

MODELS = ("vlm-s", "qwen2-5-vl-7b")
BASELINES = ("megatron-1f1b", "megatron-interleaved", "zb-h1", "optimus", "nnscaler", "segmented-static", "dip-paper")
WITH_EXPERTS = "language"
MIX, RANKS, TRIALS = "vlm-mix", 16, 12
"""Of the deep pipeline: where its batches come from, its ranks, and partitions tried."""
ALONE = 3
"""Replicas that are planned alone: the costliest ones, one of which is the slowest."""

FIRST_DRAW = "as they come"

Batch = Sequence[Microbatch]


@dataclass(frozen=True, eq=False)
class Draw:
    """The batches of all replicas, in one of the ways in which microbatches can come. ``paired``: other schedules get
    them longest first; ``searched``: joint plans choose what meets, as a run does, after an exchange, too."""

    name: str
    batches: list[Batch]
    paired: bool
    searched: bool = True


def experts_of(case: Case, modules: Sequence[ModalityModule]) -> ExpertLayers:
    """Those of the model, or all layers of a language model that has none."""
    shape = case.model.module(WITH_EXPERTS)
    if shape.layer.experts is None:
        return ExpertLayers.every(modules, [WITH_EXPERTS])
    part = case.partition.module(WITH_EXPERTS)
    flags = [
        [[shape.kind(first + i).experts for i in range(count)] for first, count in zip(firsts, counts, strict=True)]
        for firsts, counts in zip(part.first_layer, part.layers, strict=True)
    ]
    return ExpertLayers.of({WITH_EXPERTS: flags})


def graphs_of(case: Case, batches: Sequence[Batch]) -> list[OperationGraph]:
    """One graph a replica."""
    return [priced_graph(case.pricer, case.partition, b) for b in batches]


def coupled_work(graphs: Sequence[OperationGraph], experts: ExpertLayers, group: int) -> CoupledWork:
    """What the microbatches of all replicas are worth."""
    count = 1 + max(unit.microbatch for unit in graphs[0].units)
    meeting: list[Floats] = []
    own: list[Floats] = []
    for graph in graphs:
        backward = np.where(graph.has_weight, graph.fused[0], graph.backward[0])
        seconds = graph.forward[0] + np.where(graph.has_backward, backward, 0.0)
        owner = np.array([graph.units[int(u)].microbatch for u in graph.unit_of])
        meets = experts.meets(graph)
        for out, part in ((meeting, np.where(meets, seconds, 0.0)), (own, np.where(meets, 0.0, seconds))):
            out.append(np.zeros((count, graph.ranks)))
            np.add.at(out[-1], owner, part)
    replica = np.repeat(np.arange(len(graphs)), count)
    return CoupledWork(np.concatenate(meeting), np.concatenate(own), replica, len(graphs), group)


def alone(case: Case, batches: Sequence[Batch], evaluations: int) -> float:
    """The slowest replica of independent plans, after the exchange for replicas that are not coupled."""
    each = [microbatch_work(g) for g in graphs_of(case, batches)]
    replica = np.repeat(np.arange(len(batches)), case.count)
    work = Work(np.concatenate([s for s, _ in each]), np.concatenate([h for _, h in each]), replica, len(batches))
    even, flat = assign(work), [m for b in batches for m in b]
    times = []
    for r in np.argsort(-even.after, kind="stable")[:ALONE]:
        mine = [flat[m] for m in np.flatnonzero(even.replica == r)]
        graph = priced_graph(case.pricer, case.partition, mine)
        found = search(graph, budget_seconds=1e6, evaluations=evaluations, deterministic=True)
        times.append(found.iteration_time)
    return max(times)


def exchanged(work: CoupledWork, flat: Batch) -> tuple[list[Batch], CoupledAssignment, float]:
    """Batches after the exchange, and the seconds it took to work out."""
    start = time.process_time()
    found = assign_coupled(work)
    spent = time.process_time() - start
    return [[flat[m] for m in found.order(r)] for r in range(work.replicas)], found, spent


def paired(graphs: Sequence[OperationGraph]) -> Slots:
    """Every replica's microbatches longest first."""
    return np.stack([dip_pairing(microbatch_work(g)[0]) for g in graphs])


def groups(batches: Sequence[Batch], size: int) -> list[Sequence[Batch]]:
    """The coupled groups."""
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def joint(case: Case, draw: Draw, experts: ExpertLayers, size: int, evaluations: int) -> dict[str, float]:
    """Under joint plans, of the slowest group: seconds of the plans, of the first ones found, and below which none can
    be; and the worst group's time over its bound."""
    each = []
    for batches in groups(draw.batches, size):
        graphs = graphs_of(case, batches)
        slots = None if draw.searched else as_they_come(graphs)
        found: JointFound = search_joint(graphs, experts, budget_seconds=1e6, evaluations=evaluations, slots=slots)
        verify(*found.plan(graphs, experts).plans)
        time = found.iteration_time
        each.append((time, found.history[0][1], found.lower_bound, time / found.lower_bound))
    return dict(zip(("dip", "first plans", "bound", "over bound"), map(max, zip(*each, strict=True)), strict=True))


@dataclass(eq=False)
class Baselines:
    """Schedules that know nothing of coupling, their chunks chosen on batches drawn before."""

    case: Case
    names: Sequence[str]
    choices: dict[str, Partition]

    @staticmethod
    def of(case: Case, names: Sequence[str]) -> Baselines:
        known = [b.microbatches for b in load_workload(case.mix, case.model, 2, case.count, 1)]
        choices = {}
        for name in names:
            if find_schedule(name).mixed is None:
                continue
            try:
                choices[name] = tune_static(name, case.pricer, known)
            except BaselineError as error:
                print(f"{case.name} {name}: {error}", file=sys.stderr)
        return Baselines(case, [n for n in names if find_schedule(n).mixed is None or n in choices], choices)

    def seconds(self, name: str, draw: Draw, experts: ExpertLayers, size: int, evaluations: int) -> float:
        """The slowest group's; raises BaselineError."""
        entry, times = find_schedule(name), []
        effort = Effort(1e6, evaluations=evaluations, deterministic=True)
        choice = self.choices.get(name)
        for batches in groups(draw.batches, size):
            if choice is not None:
                graphs = [priced_graph(self.case.pricer, choice, b) for b in batches]
                where, group = mixed_experts(choice, [WITH_EXPERTS]), choice.group
            else:
                pricer = self.case.pricer
                if entry.paper_costs:
                    pricer = price_model(self.case.model, load_cluster("h100"), None, True, True, paper=True)
                graphs, where, group = [priced_graph(pricer, self.case.partition, b) for b in batches], experts, None
            slots = paired(graphs) if draw.paired else as_they_come(graphs)
            times.append(schedule_together(entry, graphs, where, slots, effort=effort, group=group).iteration_time)
        return max(times)


def measure(
    case: Case, baselines: Baselines, replicas: int, size: int, seed: int, evaluations: int
) -> dict[str, dict[str, float]]:
    """Seconds of every schedule in every way that microbatches come; ``alone`` by itself."""
    batches: list[Batch] = list(case.independent(replicas, seed))
    all_graphs = graphs_of(case, batches)
    experts = experts_of(case, all_graphs[0].modules)
    work = coupled_work(all_graphs, experts, size)
    alike, assignment, spent = exchanged(work, [m for b in batches for m in b])
    draws = [
        Draw(FIRST_DRAW, batches, False, searched=False),
        Draw("paired", batches, True),
        Draw("exchanged, alike slots", alike, False),
    ]
    out: dict[str, dict[str, float]] = {
        "alone": {"seconds": alone(case, batches, evaluations)},
        "exchange": {"moved": float(assignment.moved.mean()), "seconds": spent},
    }
    for draw in draws:
        out[draw.name] = joint(case, draw, experts, size, evaluations)
        over = out[draw.name]["dip"] / out["alone"]["seconds"]
        print(f"{case.name} {draw.name}: {over:.3f}", file=sys.stderr, flush=True)
        for name in baselines.names:
            try:
                out[draw.name][name] = baselines.seconds(name, draw, experts, size, max(1, evaluations // 10))
            except BaselineError as error:
                print(f"{case.name} {name}: {error}", file=sys.stderr)
    return out


def found_mean(found: Sequence[dict[str, dict[str, float]]], draw: str, what: str) -> float:
    """Over batches."""
    return float(np.mean([f[draw][what] for f in found]))


class _FirstFound(Exception):
    """Ends a search at its first set of schedules."""


def on_ranks(ranks: int) -> MultimodalModel:
    """VLM-L on so many pipeline ranks."""
    model: MultimodalModel = load_model("vlm-l")
    return replace(model, parallel=replace(model.parallel, pp=ranks))


def deep_pipeline(ranks: int, replicas: int, evaluations: int) -> dict[str, dict[str, float]]:
    """Joint plans of one group of VLM-L on so many ranks, its partition chosen on other batches: paired, and after an
    exchange."""
    model, cluster = on_ranks(ranks), load_cluster("h100")
    partition = choose_partition(
        model, cluster, load_workload(MIX, model, 2, COUNT, 1), budget_seconds=np.inf, max_trials=TRIALS
    )
    case = Case("vlm-l", model, partition, cost_model(model, cluster), MIX, Seconds(None))
    batches: list[Batch] = list(case.independent(replicas, 3))
    graphs = graphs_of(case, batches)
    experts = experts_of(case, graphs[0].modules)
    alike, _, _ = exchanged(coupled_work(graphs, experts, replicas), [m for b in batches for m in b])
    draws = (Draw("paired", batches, True), Draw("exchanged, alike slots", alike, False))
    return {draw.name: joint(case, draw, experts, replicas, evaluations) for draw in draws}


def first_plan(ranks: int, replicas: int) -> list[float]:
    """Seconds until a batch of all replicas is priced, put in order for the first time, lowered, and verified, in a
    warm process: VLM-L on so many ranks, 16 microbatches a replica."""
    model = on_ranks(ranks)
    cluster: Cluster = load_cluster("h100")
    batches = [b.microbatches for b in load_workload(MIX, model, replicas, COUNT, 3)]
    partition = paper_partition(model, cluster, load_workload(MIX, model, 1, COUNT, 1))

    def stop(schedules: Sequence[Schedule], _: float) -> None:
        first.append(schedules)
        raise _FirstFound

    for _ in range(3):  # the last one in a warm process
        first: list[Sequence[Schedule]] = []
        start = time.perf_counter()
        graphs = [priced_graph(cost_model(model, cluster), partition, b) for b in batches]
        experts = ExpertLayers.every(graphs[0].modules, [WITH_EXPERTS])
        marks = [time.perf_counter() - start]
        with contextlib.suppress(_FirstFound):
            search_joint(graphs, experts, budget_seconds=1.0, on_improved=stop)
        marks.append(time.perf_counter() - start)
        plan = make_plan_set(graphs, first[0], experts, lower_bound=0.0)
        marks.append(time.perf_counter() - start)
        verify(*plan.plans)
        marks.append(time.perf_counter() - start)
    return marks


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one group, two baselines, short searches")
    parser.add_argument("--models", help='names of model files; "": none')
    parser.add_argument("--replicas", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=160_000, help="schedules tried a group")
    parser.add_argument("--baselines", default=",".join(BASELINES))
    parser.add_argument("--skip-first-plan", action="store_true")
    parser.add_argument("--deep", action="store_true", help="one group of VLM-L on 16 ranks as well")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [n for n in options.baselines.split(",") if n]
    if options.quick:
        options.replicas, options.evaluations, names = options.group, min(options.evaluations, 2000), names[:2]
    warm_up()
    data, bars = [], []
    for model in MODELS if options.models is None else [m for m in options.models.split(",") if m]:
        case = Case.of(model, Seconds(None))
        replicas, group = options.replicas, options.group
        baselines = Baselines.of(case, names)
        found = [
            measure(case, baselines, replicas, group, 5 + b, options.evaluations) for b in range(options.batches)
        ]  # fmt: skip
        data += [{"model": model, "batch": b, **f} for b, f in enumerate(found)]
        base = float(np.mean([f["alone"]["seconds"] for f in found]))
        rows = []
        for draw in (FIRST_DRAW, "paired", "exchanged, alike slots"):
            dip = float(np.mean([f[draw]["dip"] for f in found]))
            for name in ("dip", *names):
                here = [f[draw][name] for f in found if name in f[draw]]
                if len(here) == len(found):
                    mean = float(np.mean(here))
                    rows.append([draw, name, f"{mean:.4f}", f"{mean / base:.3f}", f"{mean / dip:.3f}"])
            gap = max(f[draw]["over bound"] for f in found)
            came = found_mean(found, FIRST_DRAW, "dip")
            gains = [came / dip, came / found_mean(found, draw, "bound")]
            first = found_mean(found, FIRST_DRAW, "first plans")
            gains += [first / found_mean(found, draw, "first plans"), first / dip]
            bars.append([model, draw, f"{dip / base:.3f}", f"{gap:.3f}", *(f"{gain:.3f}" for gain in gains)])
        print(f"\n{model}: {replicas} replicas of {case.count} microbatches in groups of {group}, simulated; "
              f"independent plans take {base:.4f} s")  # fmt: skip
        print(text_table(["microbatches", "schedule", "seconds", "over independent", "over dip"], rows), flush=True)
    if bars:
        print("\nJoint plans: slowest group over independent plans, the worst group over its proven lower bound.\n"
              "Plans for microbatches as they come over these, over what no plan can be below, and, with the first\n"
              "plans found, over first plans and over these")  # fmt: skip
        columns = ["independent", "bound", "as they come", "at most", "first, over first", "first, over these"]
        print(text_table(["model", "microbatches", *columns], bars))
    if options.deep:
        rows = [
            [draw, f"{f['dip']:.4f}", f"{f['over bound']:.4f}"]
            for draw, f in deep_pipeline(RANKS, options.group, options.evaluations).items()
        ]
        print(f"\nJoint plans of {options.group} replicas of VLM-L on {RANKS} ranks, {COUNT} microbatches each")
        print(text_table(["microbatches", "seconds", "over bound"], rows))
    if not options.skip_first_plan:
        steps = first_plan(RANKS, 8)
        print("\nFirst joint plan, 8 replicas of 16 microbatches on 16 ranks (VLM-L), seconds since the batch")
        print(text_table(["priced", "in order", "lowered", "verified"], [[f"{s:.3f}" for s in steps]]))
        data.append({"first plan": steps})
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
