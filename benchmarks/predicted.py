"""scripts/bench predicted: an iteration's time and memory as predicted from a profile of this machine, and as measured.

Every family in small on two CPU ranks. Its parts are measured first, as ``dip profile SCRIPT`` does, on both cores at
once; with these costs alone (nothing is corrected by what iterations take) its batches are planned, and trained under
Megatron's own schedule and under several of DIP's. Models of Megatron-Bridge need the environment with Bridge, and are
started in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BRIDGE = Path(os.environ.get("BRIDGE_PYTHON", ROOT / ".venv-bridge" / "bin" / "python"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

# Of the host's memory nothing goes back to the kernel: to take it again costs an operation up to a fifth of its time,
# more in training than in a profile. (A GPU's allocator keeps what it has.)
os.environ |= {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(64 << 20),
}  # fmt: skip

import click  # noqa: E402

from dip_megatron.report.schedules import text_table  # noqa: E402

BAR, RANKS, WARM_UP = 0.05, 2, 2
FIELDS = ("operations", "cores_lent", "waiting", "between", "end")
"""Of ``dip trace --breakdown``."""


# -- on ranks ---------------------------------------------------------------------------------------------------------
def _quiet(log: Path) -> None:
    """What Megatron and Bridge say goes to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _initialized(world: int) -> None:
    import torch

    from tests.runtime.llava_case import initialize

    initialize(world)
    torch.manual_seed(1)


def profiled(rank: int, world: int, name: str, folder: Path, repeats: int) -> tuple[Any, Any, list[Any]]:
    """On a process alone: costs, the model as described for all ranks, and what its microbatches hold."""
    _quiet(folder / "profile.log")
    _initialized(1)
    import torch

    from benchmarks.shared.predicted_models import CASES, draw
    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.model import Parallel
    from dip_megatron.families.known import known_families
    from dip_megatron.megatron.build import record_blueprint
    from dip_megatron.megatron.lookahead import RawItems, capture_microbatch
    from dip_megatron.profile.program import ProgramRun, profile_program
    from dip_megatron.testing.synthetic import wrap

    made = CASES[name].build(folder, 1)
    family, blueprint = record_blueprint(
        [*known_families(), *made.families], made.provide, pre_process=True, post_process=True
    )
    model = family.describe(blueprint, Parallel(1, 1, 1, False, False))
    device = torch.device("cpu")

    def build(layers: Any) -> Any:
        program = family.program(blueprint, layers, rank=0, micro_batch_size=1)
        chunks = program.build_chunks()
        draw(chunks)
        return program, wrap(chunks, device)

    run, halved = (
        ProgramRun(build, model, load_cluster("cpu"), made.forward_step, device, halved=h) for h in (False, True)
    )
    batches = made.batches(True)
    items = RawItems(iter(batches))
    inputs = [capture_microbatch(made.forward_step, items, run.chunks[-1], run.program) for _ in batches]
    costs = profile_program(run, halved, model, inputs, "cpu", repeats=repeats)
    return costs, model.with_parallel(pp=RANKS), [run.program.load(given) for given in inputs]


def trained(
    rank: int, world: int, name: str, folder: Path, schedule: str, settings: dict[str, Any], iterations: int
) -> dict[str, Any]:
    """Iterations under a schedule: seconds of each between two common moments, losses, and bytes of one of them."""
    _quiet(folder / f"{schedule}.log")
    _initialized(world)
    import torch
    import torch.distributed as dist
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules

    import dip_megatron
    from benchmarks.shared.predicted_models import CASES, SEQUENCE, draw
    from dip_megatron.report.recorder import RunRecorder
    from dip_megatron.testing.synthetic import wrap

    made = CASES[name].build(folder, world)
    dip_megatron.install(made.families)
    batches = made.batches(rank == 0 or schedule != "off")
    stages = dip_megatron.build_model(
        made.provide, micro_batch_size=1, num_microbatches=len(batches), log_interval=10**6, schedule=schedule,
        **settings,
    )  # fmt: skip
    draw(stages)
    for stage in stages:
        stage.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]
    chunks = wrap(stages, torch.device("cpu"))
    seconds: list[float] = []
    losses: list[float] = []
    cores: list[list[float]] = []  # of each operation of an iteration, in the order of its plan
    record = RunRecorder.record

    def recorded(self: Any, report: Any, plan: Any, spans: Sequence[Any]) -> None:
        cores.append([span.core_seconds for span in spans])
        record(self, report, plan, spans)

    RunRecorder.record = recorded  # type: ignore[method-assign]

    def iterate() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        dist.barrier()
        began = time.perf_counter()
        found = schedules.get_forward_backward_func()(
            forward_step_func=made.forward_step, data_iterator=iter(batches), model=chunks,
            num_microbatches=len(batches), seq_length=SEQUENCE, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        losses[:] = [float(next(iter(item.values())).flatten()[0]) for item in found]

    for _ in range(iterations + WARM_UP):
        iterate()
    held = static_bytes(chunks)
    own = cores[WARM_UP:]
    return {
        "seconds": seconds[WARM_UP:], "losses": list(losses), "static": held, "bytes": held + peak_of(iterate),
        "cores": own,
    }  # fmt: skip


def static_bytes(chunks: Sequence[Any]) -> int:
    """Parameters and gradients of wrapped chunks, with Adam's two moments, which aren't made here."""
    import torch

    found: dict[int, int] = {}
    for chunk in chunks:
        tensors = [*chunk.parameters(), *(buffer.grad_data for buffer in chunk.buffers)]
        for tensor in (t for t in tensors if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values()) + 8 * sum(p.numel() for c in chunks for p in c.parameters() if p.requires_grad)


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator of the host has given out during ``work`` beyond what it had before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# -- here -------------------------------------------------------------------------------------------------------------
def measured_costs(name: str, folder: Path, repeats: int) -> tuple[Any, Any, list[Any]]:
    """Two processes measure at once; the costs are those of the first."""
    from benchmarks.predicted import profiled
    from tests.processes import Team

    teams = [Team(1) for _ in range(RANKS)]
    found: list[Any] = [None] * RANKS
    failed: list[BaseException] = []

    def measure(i: int) -> None:
        own = folder / f"alone{i}"
        try:
            own.mkdir()
            for file in folder.glob("*.json"):
                (own / file.name).symlink_to(file)
            found[i] = teams[i].run(profiled, name, folder, repeats)[0]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=measure, args=(i,)) for i in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for team in teams:
        team.close()
    if failed:
        raise failed[0]
    result: tuple[Any, Any, list[Any]] = found[0]
    return result


def predicted_off(costs: Any, model: Any, loads: Sequence[Any]) -> tuple[float, list[float], list[float]]:
    """Seconds, each rank's most bytes, and what it holds all the time, under Megatron's own schedule, with encoders
    whole on the first stage."""
    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.planner.estimate import todays_choice
    from dip_megatron.planner.facade import Effort, Setting, plan_batch
    from dip_megatron.schedulers.registry import find_schedule

    choice = todays_choice(model, len(loads))
    setting = Setting(model, load_cluster("cpu"), (), costs, recompute=False, offload=False)
    entry = find_schedule(choice.schedule)
    planned = plan_batch(entry, setting.graphs(entry, choice), loads, Effort(), choice.group)
    return planned.iteration_time, list(planned.peak_bytes), planned.graph.static_bytes.tolist()


def measured(name: str, schedules: Sequence[str], iterations: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each schedule of a family."""
    from benchmarks.predicted import trained
    from benchmarks.shared.predicted_models import CASES
    from dip_megatron.core.files import read_plans
    from tests.processes import Team

    case, rows = CASES[name], []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        case.prepare(folder)
        costs, model, loads = measured_costs(name, folder, repeats)
        costs.save(folder / "costs.json")
        cut = {
            m.name: {"segments": min(case.segments, m.layers // RANKS), "unit_size": case.unit if m.encodes else None}
            for m in model.modules
        }
        for schedule in schedules or case.schedules:
            traces = folder / f"trace-{schedule}"
            settings: dict[str, Any] = {}
            if schedule != "off":
                settings = {
                    "costs": folder / "costs.json", "cluster": "cpu", "recalibrate": False, "planner_workers": 0,
                    "search_evaluations": 300, "recompute": False, "trace_dir": traces, "trace_plans": True,
                }  # fmt: skip
                if schedule in ("static", "dynamic"):
                    settings["modules"] = cut
            team = Team(RANKS)
            try:
                ranks = team.run(trained, name, folder, schedule, settings, iterations)
            finally:
                team.close()
            seconds = ranks[0]["seconds"]
            beyond: dict[str, float] = {}
            undisturbed: float | None = None
            if schedule == "off":
                foretold, held, static = predicted_off(costs, model, loads)
            else:
                lines = [json.loads(line) for line in (traces / "iterations.jsonl").read_text().splitlines()]
                lines = lines[WARM_UP : WARM_UP + iterations]
                seconds = [line["iteration_seconds"] for line in lines]
                foretold = statistics.median(line["predicted_seconds"] for line in lines)
                plan = next(iter(read_plans(traces / "plans.jsonl")))
                held, static = list(plan.predicted.peak_bytes), plan.graph.static_bytes.tolist()
                undisturbed = replayed(plan, [rank["cores"] for rank in ranks])
                beyond = {field: beyond_plan(lines, field) for field in FIELDS}
            bytes_ = [rank["bytes"] for rank in ranks]
            rows.append({
                "family": name, "schedule": schedule, "seconds": seconds, "predicted_seconds": foretold,
                "ratio": statistics.median(seconds) / foretold, "replayed_seconds": undisturbed,
                "bytes": bytes_, "predicted_bytes": held,
                "static": [rank["static"] for rank in ranks], "predicted_static": static,
                "bytes_ratio": max(bytes_) / max(held), "beyond": beyond, "losses": ranks[-1]["losses"],
                "load_average": os.getloadavg()[0],
            })  # fmt: skip
    return rows


def replayed(plan: Any, cores: Sequence[Sequence[Sequence[float]]]) -> float:
    """Seconds of a plan whose operations take what they had a core for (``cores[rank][iteration][operation]``, medians
    over iterations), with what was planned between them: what an iteration takes beside no other program."""
    import numpy as np

    from dip_megatron.core import Kind
    from dip_megatron.core.simulate import simulate

    graph = plan.graph
    kinds = {Kind.F: "forward", Kind.B: "backward", Kind.W: "weight", Kind.BW: "fused"}
    arrays = {name: getattr(graph, name).copy() for name in kinds.values()}
    for rank, order in enumerate(plan.schedule.orders):
        own = np.median(np.array(cores[rank]), axis=0) + (graph.overhead[rank] if graph.overhead else 0.0)
        for code, seconds in zip(order.tolist(), own.tolist(), strict=True):
            kind, stage = divmod(code, graph.virtual_microbatches)
            arrays[kinds[Kind(kind)]][0, stage, rank] = seconds
    return float(simulate(graph.repriced(**arrays), plan.schedule).iteration_time)


def beyond_plan(lines: Sequence[dict[str, Any]], field: str) -> float:
    """How much longer than planned a mean rank spent on something, as a share of the iteration: the median."""
    shares = []
    for line in lines:
        ranks = zip(line["breakdown"]["measured"], line["breakdown"]["planned"], strict=True)
        more = statistics.mean((m[field] or 0.0) - (p[field] or 0.0) for m, p in ranks)
        shares.append(more / line["iteration_seconds"])
    return statistics.median(shares)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people; the last columns are what a mean rank's iteration has more than planned, as shares of it."""
    head = [
        "family",
        "schedule",
        "measured ms",
        "predicted ms",
        "ratio",
        "replayed",
        "MB",
        "predicted MB",
        "ratio",
        "",
        *FIELDS,
    ]
    return text_table(head, [
        [
            row["family"], row["schedule"], f"{1e3 * statistics.median(row['seconds']):.1f}",
            f"{1e3 * row['predicted_seconds']:.1f}", f"{row['ratio']:.3f}",
            "" if row["replayed_seconds"] is None else f"{row['replayed_seconds'] / row['predicted_seconds']:.3f}",
            f"{max(row['bytes']) / 1e6:.1f}",
            f"{max(row['predicted_bytes']) / 1e6:.1f}", f"{row['bytes_ratio']:.3f}",
            "" if max(abs(row["ratio"] - 1), abs(row["bytes_ratio"] - 1)) <= BAR else "MISSED",
            *(f"{100 * row['beyond'][field]:+.1f}%" if row["beyond"] else "" for field in FIELDS),
        ]
        for row in rows
    ])  # fmt: skip


@click.command()
@click.option("--families", help="Comma-separated; default: all that this environment, and .venv-bridge, can build.")
@click.option("--schedules", default="", help="Comma-separated; default: those that suit the family.")
@click.option("--iterations", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Of the profile.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers to this file, too.")
def main(families: str | None, schedules: str, iterations: int, repeats: int, path: Path | None) -> None:
    """Predict iterations of every family from a profile of this machine, and measure them."""
    from benchmarks.shared.predicted_models import CASES
    from tests import forked

    here = Path(sys.prefix) == BRIDGE.parents[1] or os.environ.get("DIP_BENCH_BRIDGE") == "1"
    names = families.split(",") if families else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise click.UsageError(f"no family {unknown[0]!r}; there are {', '.join(CASES)}")
    mine = [name for name in names if CASES[name].bridge == here]
    theirs = [name for name in names if CASES[name].bridge and not here]
    if here:
        forked.preload("tests.bridge.preloaded")
    rows: list[dict[str, Any]] = []
    for name in mine:
        found = measured(name, [s for s in schedules.split(",") if s], iterations, repeats)
        click.echo(table(found))
        rows += found
    if theirs and BRIDGE.is_file():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bridge.json"
            command = [
                str(BRIDGE), "-m", "benchmarks.predicted", "--families", ",".join(theirs), "--schedules", schedules,
                "--iterations", str(iterations), "--repeats", str(repeats), "--json", str(out),
            ]  # fmt: skip
            subprocess.run(command, check=True, env=os.environ | {"DIP_BENCH_BRIDGE": "1"})
            rows += json.loads(out.read_text())["rows"]
    elif theirs:
        click.echo(f"left out for want of .venv-bridge (scripts/test builds it): {', '.join(theirs)}")
    if not here:
        for what in ("ratio", "bytes_ratio"):
            worst = max((abs(row[what] - 1) for row in rows), default=0.0)
            middle = statistics.median(abs(row[what] - 1) for row in rows) if rows else 0.0
            click.echo(
                f"{'time' if what == 'ratio' else 'memory'}: off by {middle:.1%} in the median, {worst:.1%} at most"
            )
        click.echo(f"load average {', '.join(f'{x:.1f}' for x in os.getloadavg())} on {os.cpu_count()} cores")
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "load_average": os.getloadavg()}, indent=1))


if __name__ == "__main__":
    main()
