"""A line in the log and scalars every so many iterations: how training goes under its plans."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from ..core import Plan
from ..core.protocols import Exchange, Timed
from ..core.simulate import idle_share
from ..planner.exchange_agreement import ExchangeReport
from .iterations import IterationReport
from .tables import seconds

_ITERATION = struct.Struct("<3d")  # first start, last end, busy seconds of one rank


class RunProgress:
    """Means over the iterations since the last line. Ranks exchange some bytes once a line, and nothing in between."""

    def __init__(
        self,
        exchange: Exchange,
        every: int,
        say: Callable[[str], None],
        write: Callable[[dict[str, float], int], None],
    ):
        """``every``: iterations a line. ``say`` takes a line, ``write`` scalars by name and the iteration."""
        self._exchange = exchange
        self._every = max(every, 1)
        self._say = say
        self._write = write
        self._reports: list[IterationReport] = []
        self._times = b""

    def record(self, report: IterationReport, plan: Plan, spans: Sequence[Timed]) -> None:
        """Call on all ranks of the pipeline after each iteration."""
        first, last = min((s.start for s in spans), default=0.0), max((s.end for s in spans), default=0.0)
        self._times += _ITERATION.pack(first, last, sum(s.end - s.start for s in spans))
        self._reports.append(report)
        if report.iteration % self._every:
            return
        everyone = [list(_ITERATION.iter_unpack(data)) for data in self._exchange.gather(self._times)]
        scalars = _scalars(self._reports, everyone)
        self._write(scalars, report.iteration)
        self._say(_line(scalars, report))
        self._reports, self._times = [], b""


def _scalars(reports: Sequence[IterationReport], everyone: Sequence[Sequence[tuple[float, ...]]]) -> dict[str, float]:
    """``everyone[rank][iteration]``: first start, last end and busy seconds."""
    measured = busy = 0.0
    for ranks in zip(*everyone, strict=True):
        measured += max(last for _, last, _ in ranks) - min(first for first, _, _ in ranks)
        busy += sum(b for _, _, b in ranks) / len(ranks)
    count = len(reports)
    return {
        "dip/measured_seconds": measured / count,
        "dip/predicted_seconds": sum(r.predicted_seconds for r in reports) / count,
        "dip/bubble_ratio": idle_share(busy, measured),
        "dip/planned_bubble_ratio": sum(r.bubble_ratio_planned for r in reports) / count,
        "dip/plan_seconds": sum(r.latency_seconds for r in reports) / count,
        "dip/search_evaluations": sum(r.evaluations for r in reports) / count,
        "dip/stall_seconds": sum(r.stall_seconds for r in reports) / count,
        "dip/planned_at_call": sum(r.at_call for r in reports) / count,
        "dip/fallbacks": reports[-1].fallbacks,
        "dip/late_plans": reports[-1].late_plans,
        "dip/worker_deaths": reports[-1].worker_deaths,
        **_exchanged([r.exchange for r in reports if r.exchange is not None]),
    }


def _exchanged(exchanges: Sequence[ExchangeReport]) -> dict[str, float]:
    """Means over the exchanges between replicas, if there were any."""
    if not exchanges:
        return {}
    count = len(exchanges)
    return {
        "dip/slowest_replica_before": sum(e.before for e in exchanges) / count,
        "dip/slowest_replica_after": sum(e.after for e in exchanges) / count,
        "dip/microbatches_moved": sum(e.moved for e in exchanges) / count,
        "dip/samples_moved": sum(e.samples for e in exchanges) / count,
        "dip/exchange_bytes": sum(e.sent_bytes for e in exchanges) / count,
        "dip/exchange_seconds": sum(e.seconds for e in exchanges) / count,
        "dip/exchange_stall_seconds": sum(e.stall_seconds for e in exchanges) / count,
        "dip/exchanges_declined": exchanges[-1].declined,
    }


def _line(scalars: dict[str, float], last: IterationReport) -> str:
    balance = ""
    if "dip/slowest_replica_before" in scalars:
        samples = f" and {scalars['dip/samples_moved']:.0f} samples" if scalars["dip/samples_moved"] else ""
        balance = (
            f" | slowest replica {scalars['dip/slowest_replica_before']:.3f} of the mean, "
            f"{scalars['dip/slowest_replica_after']:.3f} after {scalars['dip/microbatches_moved']:.0f}{samples} moved "
            f"({scalars['dip/exchange_bytes'] / 1e6:.1f} MB from this rank) in "
            f"{seconds(scalars['dip/exchange_seconds'])}, waited {seconds(scalars['dip/exchange_stall_seconds'])}"
        )
    waited = seconds(scalars["dip/stall_seconds"])
    if scalars["dip/planned_at_call"] > 0.5:  # the first iteration is in any loop
        waited += " at the call"
    return (
        f"[dip] iteration {last.iteration}: measured {seconds(scalars['dip/measured_seconds'])}, "
        f"predicted {seconds(scalars['dip/predicted_seconds'])} | bubbles {scalars['dip/bubble_ratio']:.1%}, "
        f"planned {scalars['dip/planned_bubble_ratio']:.1%} | plan after {seconds(scalars['dip/plan_seconds'])}, "
        f"{scalars['dip/search_evaluations']:.0f} schedules tried, waited {waited} | "
        f"since start: {last.fallbacks} fallbacks, {last.late_plans} late plans, {last.worker_deaths} workers replaced"
        + balance
    )
