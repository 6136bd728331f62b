"""What the lines of a rehearsal's ranks say of the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .job import Job
from .launch import Lines, Restart

WAITED = 1e-3
"""Seconds; a plan that training waited less for was there."""
SHARE = 0.01
"""Of a one-second iteration, that control may take."""
USUAL_FILES = 1024
"""A process may have open, where nobody has raised it."""


@dataclass(frozen=True)
class Summary:
    """One job, its first iteration left out where it had more. Times in seconds; memory in bytes.

    ``iteration``, ``predicted``: the slowest replica's median. ``plan_latency``: from asking for a plan until it was
    there, median and longest; ``plan_stall``: the longest that an iteration waited for its plan; ``hidden``: the share
    of plans that nobody waited for. ``control``: of a core, a rank and iteration, for requests, broadcasts, comparing
    hashes, exchanges, looking ahead and watching, the mean of all ranks; ``control_planning``: of those that plan;
    ``stages_core``: for the executor and what it runs; ``gloo_core``: for gloo's own threads, which carry control and,
    here, activations. ``before_first``: from the call of the schedule until the last rank began, median.
    ``exchange``: one exchange, median; ``exchange_stall``: what training waited for it at most; ``moved`` microbatches,
    ``sent_bytes`` of a rank at most. ``rank_bytes`` of a rank beyond what all share; ``planner_bytes`` of the largest
    planner. ``files`` and ``threads`` of the rank that has most. ``wrong``: iterations whose microbatches weren't all
    trained once.
    """

    stages: int
    replicas: int
    iterations: int
    ready: float
    iteration: float
    predicted: float
    plan_latency: float
    plan_latency_longest: float
    plan_stall: float
    hidden: float
    control: float
    control_planning: float
    stages_core: float
    gloo_core: float
    before_first: float
    exchange: float
    exchange_stall: float
    moved: float
    sent_bytes: int
    rank_bytes: float
    planner_bytes: int
    files: int
    threads: int
    most_files: int
    checkpoint: float
    fallbacks: int
    late_plans: int
    planners_replaced: int
    wrong: tuple[int, ...]
    restarts: tuple[Restart, ...]

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas


def summarize(job: Job, lines: Lines) -> Summary:
    """``lines`` of the ranks in order: stage p of replica r is rank ``p * replicas + r``."""
    whole = lines.iterations
    judged = [rank[1:] or rank for rank in whole]
    first = judged[: job.replicas]

    def table(name: str, ranks: Sequence[Sequence[dict[str, Any]]] = judged) -> Any:
        return np.array([[line[name] for line in rank] for rank in ranks], dtype=float)

    numbers = table("numbers", whole).sum(axis=0)
    wanted = [sum(sum(job.numbers(r, i)) for r in range(job.replicas)) for i in range(job.iterations)]
    stall, latency = table("stall_seconds"), table("latency_seconds", first)
    last = [rank[-1] for rank in whole[: job.replicas]]
    saved = [line["checkpoint_seconds"] for rank in whole for line in rank if "checkpoint_seconds" in line]
    return Summary(
        stages=job.stages, replicas=job.replicas, iterations=job.iterations, ready=lines.ready_seconds,
        iteration=float(np.median(table("measured_seconds").max(axis=0))),
        predicted=float(np.median(table("predicted_seconds", first).max(axis=0))),
        plan_latency=float(np.median(latency)), plan_latency_longest=float(latency.max()),
        plan_stall=float(stall.max()), hidden=float((stall.max(axis=0) < WAITED).mean()),
        control=float(table("control_core_seconds").mean()),
        control_planning=float(table("control_core_seconds", first).mean()),
        stages_core=float(table("stage_core_seconds").mean()), gloo_core=float(table("gloo_core_seconds").mean()),
        before_first=float(np.median(table("before_first_action").max(axis=0))),
        exchange=float(np.median(table("exchange_seconds").max(axis=0))),
        exchange_stall=float(table("exchange_stall_seconds").max()), moved=float(table("moved", first).mean()),
        sent_bytes=int(table("sent_bytes").max()),
        rank_bytes=float(np.mean([h["own_bytes"] for h in lines.held])),
        planner_bytes=max((b for h in lines.held for b in h["planner_bytes"]), default=0),
        files=max(h["files"] for h in lines.held), threads=max(h["threads"] for h in lines.held),
        most_files=lines.held[0]["most_files"], checkpoint=max(saved, default=0.0),
        fallbacks=int(sum(line["fallback"] for rank in whole[: job.replicas] for line in rank[1:])),
        late_plans=sum(line["late_plans"] for line in last),
        planners_replaced=sum(line["worker_deaths"] for line in last),
        wrong=tuple(int(i) + 1 for i in np.flatnonzero(numbers != wanted)),
        restarts=lines.restarts,
    )  # fmt: skip


def limits(found: Sequence[Summary]) -> list[str]:
    """Where a job would break, by the largest one and by how things grow over all of them, in sentences."""
    largest = max(found, key=lambda s: s.ranks)
    out = [
        f"Planning: a plan is there {largest.plan_latency:.2f} s after it was asked for (longest "
        f"{largest.plan_latency_longest:.2f} s); an iteration much shorter than that would wait.",
        f"Control: {1e3 * largest.control:.1f} ms of a core a rank and iteration at {largest.ranks} ranks, "
        f"{1e3 * largest.control_planning:.1f} ms where plans are made: {largest.control:.2%} of a second.",
    ]
    ranks = np.array([s.ranks for s in found], dtype=float)
    if len(set(ranks)) > 2:
        slope, fixed = np.polyfit(ranks, [s.control for s in found], 1)
        if min(s.control for s in found) > SHARE:
            where = f"it grows by {1e6 * slope:.0f} us a rank, and takes more than {SHARE:.0%} of a second already"
        elif slope <= 0:
            where = "it doesn't grow with the job"
        else:
            most = max((SHARE - fixed) / slope, 0.0)
            where = (
                f"it grows by {1e6 * slope:.0f} us a rank, and is {SHARE:.0%} of a second at about {most:,.0f} ranks"
            )
        slope, fixed = np.polyfit(ranks, [s.files for s in found], 1)
        out[-1] += f" By a line through {len(found)} jobs {where}."
        if slope > 0:
            out.append(
                f"Open files: {largest.files} of {largest.most_files} at {largest.ranks} ranks, {slope:.1f} more with "
                f"each rank: the usual limit of {USUAL_FILES} (ulimit -n) is reached at about "
                f"{max((USUAL_FILES - fixed) / slope, 0.0):,.0f} ranks."
            )
    else:
        out.append(f"Open files: {largest.files} of {largest.most_files} (ulimit -n), {largest.threads} threads.")
    for s in found:
        out += [
            f"{s.stages} x {s.replicas}: iterations {', '.join(map(str, s.wrong))} trained on other microbatches than "
            "theirs, or not on all: that is a bug"
        ] * bool(s.wrong)
    return out
