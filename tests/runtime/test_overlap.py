"""Transfers never hold up what doesn't need them; a chunk's reduction starts with its last weight gradient."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Compute, Kind, Payload
from dip_megatron.core.lower import incoming, make_plan, outgoing
from dip_megatron.runtime.clock import Clock
from dip_megatron.runtime.executor import Executor
from dip_megatron.schedulers.greedy import greedy
from tests.drawn import settings
from tests.graphs import random_graph
from tests.patience import LONG
from tests.processes import team
from tests.runtime.gpt_case import GptCase
from tests.runtime.split_case import Drawn, reductions


class Held:
    """A transfer that ends when it is told to."""

    def __init__(self, transport):
        self.transport, self.arrived = transport, False

    def wait(self):
        with self.transport.changed:
            self.transport.waiting = self
            self.transport.changed.notify_all()
            self.transport.changed.wait_for(lambda: self.arrived)
            self.transport.waiting = None
        return {}

    def done(self):
        return self.arrived


class HeldTransport:
    """As slow as can be: nothing arrives and nothing has been sent until it is told to."""

    sees_arrivals = False

    def __init__(self):
        self.changed = threading.Condition()
        self.waiting = None
        self.sent = defaultdict(list)
        self.received = defaultdict(list)

    def open(self, channels):
        pass

    def send(self, channel, tensors):
        self.sent[channel].append(Held(self))
        return self.sent[channel][-1]

    def receive(self, channel, payload):
        self.received[channel].append(Held(self))
        return self.received[channel][-1]

    def end(self, transfer):
        with self.changed:
            transfer.arrived = True
            self.changed.notify_all()

    def until_waiting(self, thread):
        """The transfer that the executor now waits for; None once it has ended."""
        with self.changed:
            while not (self.waiting is not None and not self.waiting.arrived) and thread.is_alive():
                self.changed.wait(0.01)
            return self.waiting if thread.is_alive() else None


class Recorder:
    """Computes nothing and remembers what it was asked to."""

    def __init__(self, graph):
        self.graph, self.ran = graph, []

    def forward(self, key, unit, strategy, inputs):
        self.ran.append(key)
        return {}

    def backward(self, key, unit, strategy, gradients):
        self.ran.append(key)
        forward = key.__class__(Kind.F, *[getattr(key, n) for n in ("module", "segment", "unit", "rank")])
        return [{} for _ in incoming(self.graph, forward)]

    def weight(self, key, unit, strategy):
        self.ran.append(key)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(0, 3), release=st.randoms(use_true_random=False))
def test_only_what_needs_a_message_waits_for_it(seed, rank, release):
    """With every transfer withheld a rank computes up to the first stage whose input is missing, and has begun all its
    sends; with some more input, up to the next such stage; and its sends need end only at the very end."""
    graph = random_graph(seed)
    rank %= graph.ranks
    nothing: dict[tuple[int, ...], Payload] = {
        (s, t): () for s in range(graph.virtual_microbatches) for t in (s, *graph.next_virtual_microbatches[s])
    }
    plan = make_plan(graph, greedy(graph), lower_bound=0.0, payloads=nothing)
    stages = [a.operation for a in plan.actions[rank] if isinstance(a, Compute)]
    arriving = defaultdict(list)
    for action in plan.actions[rank]:
        if not isinstance(action, Compute) and action.kind == "irecv":
            arriving[action.message.channel].append(action.message)
    transport, runner = HeldTransport(), Recorder(graph)
    executor = Executor(rank, transport, Clock(torch.device("cpu")))
    thread = threading.Thread(target=executor.run, args=(plan, runner), daemon=True)
    thread.start()
    arrived = set()
    while True:
        transport.until_waiting(thread)
        possible = 0
        while possible < len(stages) and all(
            m in arrived or m.channel.source == rank for m in incoming(graph, stages[possible])
        ):
            possible += 1
        assert runner.ran == stages[:possible]
        sends = [m for key in runner.ran for m in outgoing(graph, key) if m.channel.target != rank]
        assert sum(map(len, transport.sent.values())) == len(sends)
        if possible == len(stages):
            break
        # The next message of any channel that has a receive waiting; channels deliver in order.
        open_channels = [c for c, transfers in transport.received.items() if not all(t.arrived for t in transfers)]
        channel = release.choice(sorted(open_channels))
        transfers = transport.received[channel]
        place = next(i for i, t in enumerate(transfers) if not t.arrived)
        arrived.add(arriving[channel][place])
        transport.end(transfers[place])
    for transfers in [*transport.sent.values(), *transport.received.values()]:
        for transfer in transfers:
            transport.end(transfer)
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.mark.parametrize("layers", [((1, 1),), ((1, 1), (1, 1))])
def test_a_chunks_reduction_starts_with_its_last_weight_gradient(layers):
    """With --overlap-grad-reduce: before the next stage of the rank, unless a later chunk's reduction must go first."""
    for events in team(2).run(reductions, GptCase(3, layers), Drawn(4, 0.6)):
        segments = len(layers)
        assert sorted(index for kind, index in events if kind == "reduce") == list(range(segments))
        last = {k: max(i for i, event in enumerate(events) if event == ("gradient", k)) for k in range(segments)}
        started = {index: i for i, (kind, index) in enumerate(events) if kind == "reduce"}
        for k in range(segments):
            ready = max(last[j] for j in range(k, segments))
            between = events[ready + 1 : started[k]]
            assert started[k] > ready
            assert all(kind == "reduce" for kind, _ in between)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_cannot_read_ahead_says_that_it_was_reading(ranks):
    """In the gap before a message, or at the end of a plan without any."""
    graph = random_graph(3, ranks=ranks)
    nothing: dict[tuple[int, ...], Payload] = {
        (s, t): () for s in range(graph.virtual_microbatches) for t in (s, *graph.next_virtual_microbatches[s])
    }
    plan = make_plan(graph, greedy(graph), lower_bound=0.0, payloads=nothing)

    def broken() -> Iterator[None]:
        raise OSError("shard-17.tar")
        yield

    executor = Executor(ranks - 1, HeldTransport(), Clock(torch.device("cpu")))
    with pytest.raises(OSError, match="shard-17"):
        executor.run(plan, Recorder(graph), 5, broken())  # type: ignore[arg-type]
    assert str(executor.position).endswith(", reading the next iteration's microbatches")
    assert "waiting for" not in str(executor.position)
