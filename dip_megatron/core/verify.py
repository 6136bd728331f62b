"""The strict verifier: plans that could hang, lose a gradient or break their memory limit never run.

The replay uses rendezvous semantics, the strictest any transport has: a send ends only when its receive is posted, per
channel, in order, as NCCL matches them (it ignores tags). Plans of coupled replicas must each pass by themselves; they
must agree where they meet (:mod:`.coupled_checks`); and the union of all, with the operations of one event and the
starts of one reduction made one, and each reduction after the one before it in their order, must have no cycle. Why
that makes many such sets end together says :mod:`.reductions`. The last is decided by running all actions at once: an
event, a reduction, a send or a wait that can take place never keeps another from it, so that one run is as good as all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import kernels
from .actions import Channel
from .codes import Decoder, code_count
from .coupled_checks import check_agreement, check_shapes, cycle, experts_of
from .errors import CouplingError, PlanError
from .experts import NO_EXPERTS, ExpertLayers
from .graph import Ints, OperationGraph
from .order import check_complete
from .plan import Plan
from .reductions import reduction_fault
from .simulate.kernels import pad_orders, simulate_compiled

__all__ = ["PlanError", "verify", "verify_replica"]


def verify(*plans: Plan, experts: ExpertLayers | None = None) -> None:
    """Raise at the first fault of the plans of one or several replicas: of completeness, order, messages, reductions,
    memory, payloads or prediction, or a deadlock.

    Args:
        plans: One plan a replica, of all replicas of their set.
        experts: The layers in which the replicas meet; by default those that the plans carry
            (:class:`.experts.Coupled`), which must agree.

    Raises:
        PlanError: At the first fault; a CouplingError if it is one of several replicas'.
    """
    experts = experts_of(plans) if experts is None else experts
    check_shapes(plans, experts)
    for replica, plan in enumerate(plans):
        try:
            verify_replica(plan)
        except PlanError as error:
            if len(plans) == 1:
                raise
            raise CouplingError("plan", f"replica {replica}: {error}") from error
    if len(plans) > 1:
        check_agreement(plans, experts)
        _replay(plans, experts)


def verify_replica(plan: Plan) -> None:
    """:func:`verify` without that a plan agrees with those of the other replicas of its set."""
    graph = plan.graph
    fault = check_complete(graph, plan.schedule)
    if fault:
        raise PlanError(fault)
    if len(plan.codes) != graph.ranks:
        raise PlanError(f"{len(plan.codes)} ranks have actions, the graph has {graph.ranks}")
    codes, counts = _padded(graph, plan.codes)
    _check_actions(plan, codes, counts)
    fault = reduction_fault(plan)
    if fault:
        raise PlanError(fault)
    _replay((plan,), NO_EXPERTS)
    for rank, peak in enumerate(simulate_compiled(graph, plan.schedule).peak_bytes):
        limit = graph.memory_limit[rank]
        if peak > limit * (1 + 1e-9):
            raise PlanError(f"rank {rank}: needs {peak:.0f} bytes, {peak - limit:.0f} over its limit of {limit:.0f}")
    if plan.predicted.iteration_time < plan.predicted.lower_bound * (1 - 1e-9):
        raise PlanError(
            f"predicted {plan.predicted.iteration_time} s lies under the bound {plan.predicted.lower_bound} s"
        )
    if plan.payloads:
        for s in range(graph.virtual_microbatches):
            inner = [(s, r) for r in range(graph.ranks) if r != graph.exit_rank(s) and not graph.is_idle[s, r]]
            for target, rank in inner + [(n, graph.exit_rank(s)) for n in graph.next_virtual_microbatches[s]]:
                if plan.payload(s, target, rank) is None:
                    raise PlanError(f"no payload for virtual microbatch {s} to {target}")


def _padded(graph: OperationGraph, lines: tuple[Ints, ...]) -> tuple[Ints, Ints]:
    """All ranks' codes as one array, and their counts; every code is one of the graph's."""
    counts = np.array([len(line) for line in lines], dtype=np.int32)
    codes = np.zeros((len(lines), max(1, int(counts.max(initial=0)))), dtype=np.int32)
    for rank, line in enumerate(lines):
        outside = np.flatnonzero((line < 0) | (line >= code_count(graph)))
        if len(outside):
            raise PlanError(f"rank {rank}, action {outside[0]}: {line[outside[0]]} is not the code of an action")
        codes[rank, : len(line)] = line
    return codes, counts


_FAULTS = {
    kernels.OTHER_RANK: "is another rank's",
    kernels.BAD_SEND: "sends what is not there, or sends it twice",
    kernels.BAD_RECEIVE: "receives it twice, or what nobody sends",
    kernels.BAD_WAIT_RECEIVE: "waits for a receive that is not posted, or waits twice",
    kernels.BAD_WAIT_SEND: "waits for a send that has not begun, or waits twice",
    kernels.NEVER_SENT: "never sends",
    kernels.NEVER_AWAITED: "never awaits",
    kernels.NEVER_SETTLED: "never awaits its send",
}


def _check_actions(plan: Plan, codes: Ints, counts: Ints) -> None:
    graph = plan.graph
    orders, lengths = pad_orders(plan.schedule)
    messages = 2 * len(graph.edges.source)
    fault = np.zeros(4, dtype=np.int32)
    kernels.check_codes(
        kernels.messages_of(graph), orders, lengths, codes, counts, np.zeros(messages + 1, dtype=np.int32),
        np.zeros(messages, dtype=np.uint8), fault,
    )  # fmt: skip
    what, rank, i, message = fault.tolist()
    if what == kernels.NO_FAULT:
        return
    if what == kernels.WRONG_ORDER:
        raise PlanError(f"rank {rank}: its actions are not in the order of its operations")
    decoder = Decoder(graph)
    if i < 0:
        raise PlanError(f"rank {rank}: {_FAULTS[what]} {decoder.message(message)}")
    place = f"rank {rank}, action {i} ({decoder.action(int(codes[rank, i]), rank)})"
    if what == kernels.EARLY_COMPUTE:
        raise PlanError(f"{place}: runs before it has awaited {decoder.message(message)}")
    raise PlanError(f"{place}: {_FAULTS[what]}")


def _replay(plans: Sequence[Plan], experts: ExpertLayers) -> None:
    """Run the actions of all replicas together. Those of several have been replayed one by one before."""
    graph = plans[0].graph
    x = kernels.make_rendezvous([p.graph for p in plans], experts)
    lines = [line for p in plans for line in p.codes]
    counts = np.array([len(line) for line in lines], dtype=np.int32)
    codes = np.zeros((len(lines), max(1, int(counts.max(initial=0)))), dtype=np.int32)
    for i, line in enumerate(lines):
        codes[i, : len(line)] = line
    place, fault = np.zeros(len(lines), dtype=np.int32), np.zeros(4, dtype=np.int32)
    kernels.replay_codes(x, codes, counts, place, fault)
    what, where, first, second = fault.tolist()
    if what == kernels.NO_FAULT:
        return
    decoder = Decoder(graph)
    if len(plans) > 1:
        raise CouplingError("cycle", cycle(plans, experts, place))
    if what == kernels.DEADLOCK:
        stuck = [
            f"rank {r} at action {i} ({decoder.action(int(codes[r, i]), r)})"
            for r, i in enumerate(place.tolist())
            if i < counts[r]
        ]
        raise PlanError("the plan deadlocks: " + "; ".join(stuck))
    pair, gradient = divmod(where, 2)
    channel = Channel(*divmod(pair, graph.ranks), bool(gradient))
    if what == kernels.MISMATCH:
        sent, received = decoder.message(first), decoder.message(second)
        raise PlanError(f"channel {channel}: {sent} is sent where {received} is received")
    raise PlanError(f"channel {channel}: {first} sends for {second} receives")
