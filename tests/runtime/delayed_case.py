"""Random plans on real processes, over a transport that is as slow and as disorderly as NCCL may be, but no more.

Per channel, messages come in the order of their sends, and a send ends only after its receive was posted. When a
transfer begins, when it ends, and which of several channels comes first is drawn. Stages compute whole numbers that
tell whose output went where; every rank compares them with what a plain recursion over the graph gives.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import numpy as np
import torch

from dip_megatron.core import Channel, Kind, Operation, OperationGraph, Payload, Plan, TensorSpec, Unit
from dip_megatron.core.lower import incoming, make_plan
from dip_megatron.core.verify import verify
from dip_megatron.runtime.clock import Clock
from dip_megatron.runtime.executor import Executor
from dip_megatron.runtime.transport import Tensors, TransportError, ring_channels
from tests.core.simulate.test_kernels import drawn_schedule
from tests.graphs import predecessors, random_graph
from tests.patience import APART

PRIME = 2**31 - 1
SLOW_SHARE, SLOW_SECONDS = 0.1, 1e-3


def constant(*parts: object) -> int:
    """A number for a place, the same in every process."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def output(stage: Operation, inputs: list[int]) -> int:
    """Of a forward; the order of inputs matters."""
    return (sum((i + 2) * x for i, x in enumerate(inputs)) + constant("F", *place(stage))) % PRIME


def gradient(stage: Operation, own_output: int, gradients: list[int]) -> int:
    """Of a backward, before it is handed to each of the forward's inputs."""
    return (sum((i + 3) * g for i, g in enumerate(gradients)) + own_output + constant("B", *place(stage))) % PRIME


def share(total: int, number: int) -> int:
    """What the ``number``-th input of a stage gets of its gradient."""
    return total * (number + 5) % PRIME


def place(stage: Operation) -> tuple[str, int, int, int]:
    return stage.module, stage.segment, stage.unit, stage.rank


class PlainOrder:
    """The same numbers, worked out from the dependencies alone."""

    def __init__(self, graph: OperationGraph):
        self._graph = graph
        self._readers: dict[Operation, list[Operation]] = defaultdict(list)
        self.stages = [
            graph.operation(Kind.F, s, p) for s in range(graph.virtual_microbatches) for p in range(graph.ranks)
        ]
        for stage in self.stages:
            for source in predecessors(graph, stage):
                self._readers[source].append(stage)
        self.forward = cache(self._forward)
        self.backward = cache(self._backward)

    def _forward(self, stage: Operation) -> int:
        return output(stage, [self.forward(source) for source in predecessors(self._graph, stage)])

    def _backward(self, stage: Operation) -> int:
        gradients = []
        for key in predecessors(self._graph, replace(stage, kind=Kind.B)):
            if key.kind == Kind.B:
                reader = replace(key, kind=Kind.F)
                number = predecessors(self._graph, reader).index(stage)
                gradients.append(share(self.backward(reader), number))
        return gradient(stage, self.forward(stage), gradients)

    def weights(self, rank: int) -> dict[tuple[str, int], int]:
        """Sums of all gradients of each of a rank's chunks that train."""
        sums: dict[tuple[str, int], int] = defaultdict(int)
        for stage in self.stages:
            s = self._graph.virtual_microbatch_of(stage)
            if stage.rank == rank and self._graph.has_weight[s, rank]:
                sums[stage.module, stage.segment] += self.backward(stage)
        return dict(sums)


@dataclass
class WholeNumbers:
    """Stage runner of the executor."""

    inputs: dict[tuple, list[int]] = field(default_factory=dict)
    outputs: dict[tuple, int] = field(default_factory=dict)
    left: dict[tuple, int] = field(default_factory=dict)
    sums: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    sizes: dict[tuple, int] = field(default_factory=dict)

    def forward(self, operation: Operation, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        values = [value(payload) for payload in inputs]
        self.inputs[place(operation)] = values
        self.outputs[place(operation)] = output(operation, values)
        return tensors(self.outputs[place(operation)], operation.unit)

    def backward(self, operation: Operation, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        total = gradient(operation, self.outputs[place(operation)], [value(payload) for payload in gradients])
        if operation.kind == Kind.BW:
            self.sums[operation.module, operation.segment] += total
        else:
            self.left[place(operation)] = total
        # A gradient has the shape of the input it belongs to, and that of the unit which the input came from.
        return [
            tensors(share(total, i), self.sizes[(*place(operation), i)])
            for i in range(len(self.inputs[place(operation)]))
        ]

    def weight(self, operation: Operation, unit: Unit, strategy: str) -> None:
        self.sums[operation.module, operation.segment] += self.left.pop(place(operation))

    def reduce(self, module: str, segment: int) -> None:
        raise AssertionError("a replica that plans alone starts reductions when chunks are done")


def tensors(number: int, unit: int) -> Tensors:
    return {"x": torch.full((1 + unit % 3,), number, dtype=torch.int64)}


def value(payload: Tensors) -> int:
    numbers = payload["x"].tolist()
    assert len(set(numbers)) == 1, "two messages are mixed up"
    return int(numbers[0])


def plan_of(seed: int, ranks: int) -> Plan:
    """The same on every rank."""
    graph = random_graph(seed, ranks=ranks, microbatches=1 + seed % 4, candidates=1)
    graph = replace(graph, memory_limit=np.full(ranks, np.inf))
    payloads: dict[tuple[int, ...], Payload] = {}
    for s in range(graph.virtual_microbatches):
        unit = int(graph.unit_of[s])
        for n in (s, *graph.next_virtual_microbatches[s]):
            payloads[s, n] = (TensorSpec("x", (1 + unit % 3,), "int64"),)
    plan = make_plan(graph, drawn_schedule(graph, seed), lower_bound=0.0, payloads=payloads)
    verify(plan)
    return plan


# -- transport -------------------------------------------------------------------------------------------------------
@dataclass
class _Transfer:
    channel: Channel
    tensors: Tensors
    ended: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> Tensors:
        if not self.ended.wait(APART):
            raise TransportError(f"channel {self.channel}: nothing came within {APART:.0f} s")
        return self.tensors

    def done(self) -> bool:
        return self.ended.is_set()


class _End:
    """One end of a channel: a thread that carries its transfers one after the other."""

    def __init__(self, connection: Connection, carry: Callable[[Connection, Tensors, Callable[[], None]], None], seed):
        self._connection, self._carry, self._random = connection, carry, random.Random(seed)
        self._transfers: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, transfer: _Transfer) -> _Transfer:
        self._transfers.put(transfer)
        return transfer

    def _run(self) -> None:
        while True:
            transfer = self._transfers.get()
            self._linger()
            self._carry(self._connection, transfer.tensors, self._linger)
            self._linger()
            transfer.ended.set()

    def _linger(self) -> None:
        if self._random.random() < SLOW_SHARE:
            time.sleep(self._random.uniform(0.0, SLOW_SECONDS))


def _send(connection: Connection, tensors: Tensors, linger: Callable[[], None]) -> None:
    connection.recv_bytes()  # the receive is posted
    linger()
    # Read only now: until a send has ended its tensors must stay as they are.
    connection.send_bytes(b"".join(t.numpy().tobytes() for t in tensors.values()))


def _receive(connection: Connection, tensors: Tensors, linger: Callable[[], None]) -> None:
    connection.send_bytes(b"posted")
    data, at = connection.recv_bytes(), 0
    for t in tensors.values():
        size = t.numel() * t.element_size()
        t.copy_(torch.frombuffer(bytearray(data[at : at + size]), dtype=t.dtype))
        at += size
    assert at == len(data), "a message of another size than its receiver expects"


class DelayedTransport:
    """Over sockets in a folder that all ranks know."""

    sees_arrivals = False

    def __init__(self, folder: Path, rank: int, world: int, seed: int):
        channels = ring_channels(world, replicated=True)
        paths = {c: str(folder / f"{c.source}-{c.target}-{int(c.gradient)}") for c in channels}
        listeners = {c: Listener(paths[c], "AF_UNIX") for c in channels if c.target == rank}
        self._sends: dict[Channel, _End] = {}
        self._receives: dict[Channel, _End] = {}
        for c in channels:
            if c.source == rank:
                self._sends[c] = _End(_connect(paths[c]), _send, f"{seed} send {c}")
            elif c.target == rank:
                with listeners[c] as listener:
                    self._receives[c] = _End(listener.accept(), _receive, f"{seed} receive {c}")

    def open(self, channels: Iterable[Channel]) -> None:
        pass

    def send(self, channel: Channel, tensors: Tensors) -> _Transfer:
        return self._sends[channel].begin(_Transfer(channel, tensors))

    def receive(self, channel: Channel, payload: Payload) -> _Transfer:
        buffers = {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in payload}
        return self._receives[channel].begin(_Transfer(channel, buffers))


def _connect(path: str) -> Connection:
    for _ in range(round(10 * APART)):
        try:
            return Client(path, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.1)
    raise TimeoutError(f"nobody listens at {path}")


def run_plans(rank: int, world: int, folder: str, seeds: list[int]) -> list[int]:
    """Run one plan per seed; those whose numbers differ from the plain order's on this rank."""
    transport = DelayedTransport(Path(folder), rank, world, seeds[0])
    executor = Executor(rank, transport, Clock(torch.device("cpu")))
    wrong = []
    for seed in seeds:
        plan = plan_of(seed, world)
        plain = PlainOrder(plan.graph)
        mine = [stage for stage in plain.stages if stage.rank == rank]
        runner = WholeNumbers(
            sizes={(*place(s), i): m.source.unit for s in mine for i, m in enumerate(incoming(plan.graph, s))}
        )
        executor.run(plan, runner, seed)
        same = all(runner.outputs[place(stage)] == plain.forward(stage) for stage in mine)
        # A frozen stage has a B and no W.
        left = [
            stage
            for stage in runner.left
            if plan.graph.has_weight[plan.graph.virtual_microbatch(stage[2], stage[1]), rank]
        ]
        if not same or dict(runner.sums) != plain.weights(rank) or left:
            wrong.append(seed)
    return wrong
