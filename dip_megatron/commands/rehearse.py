"""``dip rehearse``: the job before the job."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..describe.cost import Costs, load_cluster
from ..describe.model import MultimodalModel, load_model
from ..describe.partition import read_partition
from ..describe.workload import load_workload
from ..planner.facade import Setting, searched_partition
from ..rehearsal.job import Fault, FaultKind, Job, drawn, job_graphs, module_settings, write_prices
from ..rehearsal.launch import rehearse as run_job
from ..rehearsal.summary import SHARE, Summary, limits, summarize
from ..report.schedules import text_table
from ..report.tables import seconds
from .common import InputError, json_option, one_line_errors, print_json, progress_bar

_SIZE = re.compile(r"(\d+)x(\d+)")
_FAULTS: dict[str, FaultKind] = {
    "kill_planner": "planner dies", "late_planner": "planner is late", "kill_rank": "rank dies",
}  # fmt: skip


@click.command()
@click.option("--model", required=True, help="Shipped name (vlm-s, t2v-l, ...) or YAML file.")
@click.option("--cluster", default="h100", show_default=True, help="Shipped name (h100, h200, ...) or YAML file.")
@click.option("--workload", required=True, help="Shipped mix (vlm-mix, ...), mix YAML, or JSON-lines file.")
@click.option("--costs", type=click.Path(path_type=Path), help="Measured costs, from `dip profile`.")
@click.option(
    "--jobs",
    default="4x2",
    show_default=True,
    help="Pipeline ranks x replicas of each job to rehearse, with commas between.",
)
@click.option("--microbatches", type=click.IntRange(min=1), default=16, show_default=True, help="Of a replica.")
@click.option("--iterations", type=click.IntRange(min=2), default=6, show_default=True, help="To train.")
@click.option("--partition", type=click.Path(path_type=Path), help="Partition YAML (default: search one).")
@click.option("--memory-gb", type=click.FloatRange(min=0, min_open=True), help="Limit a rank's memory (1e9 B).")
@click.option(
    "--balance",
    type=click.Choice(["off", "swap"]),
    default="swap",
    show_default=True,
    help="Whether replicas exchange microbatches.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds slept for a second of price.",
)
@click.option(
    "--budget", type=click.FloatRange(min=0), help="Seconds of search a plan (default: what an iteration leaves)."
)
@click.option(
    "--microbatch-kib",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="What travels of a microbatch that changes replicas.",
)
@click.option("--save-interval", type=click.IntRange(min=0), default=0, help="Iterations between two checkpoints.")
@click.option("--kill-planner", multiple=True, metavar="REPLICA@ITERATION", help="Kill a planner there.")
@click.option("--late-planner", multiple=True, metavar="REPLICA@ITERATION", help="Stop a planner there for a while.")
@click.option(
    "--kill-rank",
    multiple=True,
    metavar="RANK@ITERATION",
    help="Kill a rank there, and launch the job again once the others have left.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=1800.0,
    show_default=True,
    help="Seconds after which a job is stopped.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep what the ranks wrote and said in this folder.",
)
@json_option
@one_line_errors
def rehearse(jobs: str, limit: float, keep: Path | None, as_json: bool, **values: Any) -> None:
    """The job before the job: its processes, planners, exchanges, checkpoints and faults, on this machine.

    A process for each pipeline rank of each replica runs the loop, the planner service and the executor of a run, over
    gloo; stages sleep for their price and hold no weights. Printed: how long planning takes and whether training waits
    for it, what control costs a rank, what planners and ranks hold, and where a larger job would break. Emulated: the
    stages are; all else is measured here, on cores that all ranks share.
    """
    faults = tuple(Fault.read(kind, text) for option, kind in _FAULTS.items() for text in values[option])
    sizes = [_SIZE.fullmatch(word.strip()) for word in jobs.split(",")]
    found: list[Summary] = []
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar("pricing", None, as_json))
        for size in sizes:
            if size is None or int(size[1]) < 2 or int(size[2]) < 1:
                raise InputError(
                    f"--jobs {jobs}: PIPELINExREPLICAS with commas between, such as 8x1,16x8; at least 2x1"
                )
            name = size[0]
            if keep is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                folder = keep / name
                if folder.exists() and any(folder.iterdir()):
                    raise InputError(f"{folder} isn't empty; --keep another folder")
                folder.mkdir(parents=True, exist_ok=True)
            job = _job(int(size[1]), int(size[2]), faults, values)
            advance(f"{name}: pricing {len(job.microbatches)} microbatches")
            write_prices(job, job_graphs(job, load_cluster(job.cluster)), folder, lambda: advance(None))
            found.append(summarize(job, run_job(job, folder, limit, advance)))
    if as_json:
        print_json({"jobs": [asdict(s) | {"ranks": s.ranks} for s in found], "limits": limits(found)})
    else:
        click.echo(_told(found, values))
    if any(s.wrong for s in found):
        raise SystemExit(1)


def _job(stages: int, replicas: int, faults: tuple[Fault, ...], values: dict[str, Any]) -> Job:
    """The job of this size that the options describe."""
    model: MultimodalModel = load_model(values["model"]).with_parallel(tp=None, pp=stages, dp=replicas)
    coupled = model.parallel.coupled
    if replicas % coupled:
        raise InputError(
            f"--jobs {stages}x{replicas}: {coupled} replicas of {values['model']} share a group of experts; give a "
            "multiple of so many, or a model file with a smaller parallel.ep"
        )
    count, iterations = values["microbatches"], values["iterations"]
    batches = load_workload(values["workload"], model, replicas * iterations, count, 0)
    if len(batches) < replicas * iterations or any(len(b.microbatches) != count for b in batches):
        raise InputError(
            f"--workload {values['workload']}: it has {len(batches)} batches, {iterations} iterations of {replicas} "
            f"replicas need {replicas * iterations} of {count} microbatches; give fewer --iterations, or a mix"
        )
    cluster, costs = load_cluster(values["cluster"]), values["costs"]
    memory = values["memory_gb"] * 1e9 if values["memory_gb"] else None
    if values["partition"] is not None:
        partition = read_partition(values["partition"], model)
    else:
        earlier = load_workload(values["workload"], model, 2, count, 1)
        setting = Setting(model, cluster, earlier, Costs.load(costs) if costs else None, memory)
        partition = searched_partition(setting, 5.0)
    settings: dict[str, object] = {
        "modules": module_settings(partition), "balance": values["balance"] if replicas > 1 else "off",
        "cluster": values["cluster"], "costs": costs, "memory_limit": memory, "search_budget": values["budget"],
        "timeout_seconds": 120.0,
    }  # fmt: skip
    return Job(
        model, values["cluster"], costs, memory, partition, drawn([b.microbatches for b in batches]), count, replicas,
        settings, values["scale"], values["save_interval"], 1024 * values["microbatch_kib"], faults,
    ).checked()  # fmt: skip


def _rows(s: Summary) -> dict[str, str]:
    """What is printed of a job, by its name."""
    return {
        "ranks": str(s.ranks),
        "iteration": seconds(s.iteration),
        "  as planned": seconds(s.predicted),
        "plan there after": seconds(s.plan_latency),
        "  training waited for it": seconds(s.plan_stall),
        "  hidden": f"{s.hidden:.0%}",
        "control, ms of a core": f"{1e3 * s.control:.1f}",
        "  of planning ranks": f"{1e3 * s.control_planning:.1f}",
        "  gloo's threads": f"{1e3 * s.gloo_core:.1f}",
        "  the stages": f"{1e3 * s.stages_core:.0f}",
        "call to first action": seconds(s.before_first),
        "exchange": seconds(s.exchange),
        "  training waited": seconds(s.exchange_stall),
        "  microbatches moved": f"{s.moved:.1f}",
        "  sent by a rank, MB": f"{s.sent_bytes / 1e6:.2f}",
        "memory of a rank, MB": f"{s.rank_bytes / 1e6:.0f}",
        "  of a planner, MB": f"{s.planner_bytes / 1e6:.0f}",
        "open files": str(s.files),
        "threads": str(s.threads),
        "until all could train": seconds(s.ready),
    }


def _told(found: list[Summary], values: dict[str, Any]) -> str:
    columns = [list(_rows(s).items()) for s in found]
    rows = [[line[0][0], *(value for _, value in line)] for line in zip(*columns, strict=True)]
    text = [
        f"Emulated: {values['model']} on {values['cluster']}, {values['microbatches']} microbatches a replica, "
        f"{values['iterations']} iterations, the first left out; stages sleep {values['scale']:g} x their price.",
        text_table(["", *(f"{s.stages} x {s.replicas}" for s in found)], rows),
        *limits(found),
    ]
    for s in found:
        name = f"{s.stages} x {s.replicas}"
        if s.checkpoint:
            text.append(f"{name}: checkpoints took up to {seconds(s.checkpoint)}, without weights.")
        if s.fallbacks or s.late_plans or s.planners_replaced:
            text.append(f"{name}: {s.fallbacks} plans of the greedy's, {s.late_plans} late, "
                        f"{s.planners_replaced} planners replaced; no iteration was lost.")  # fmt: skip
        for r in s.restarts:
            text.append(f"{name}: {r.fault}: the others had left after {seconds(r.others_left_seconds)}, {r.told} of "
                        f"{s.ranks - 1} said where they stood; launched again in {seconds(r.launch_seconds)}, from "
                        f"iteration {r.resumed}.")  # fmt: skip
    met = all(s.control <= SHARE and s.hidden == 1.0 for s in found)
    text.append(
        f"Control within {SHARE:.0%} of a one-second iteration on every rank's mean, and all plans there in time: "
        f"{'yes' if met else 'no'}."
    )
    return "\n".join(text)
