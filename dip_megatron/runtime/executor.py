"""The executor: runs one rank's actions, each through the handler registered for its kind.

It knows plans and messages, not models: a :class:`StageRunner` computes, a :class:`Transport` carries. All state of an
iteration lives in :class:`Position` and the executor's mailboxes, and is gone at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..core import Action, Communicate, CommunicationKind, Compute, Kind, Message, Operation, Payload, Plan, Unit
from ..core.lower import incoming, outgoing
from .clock import Clock
from .transport import Tensors, Transfer, Transport


class StageRunner(Protocol):
    """Computes stages. ``inputs`` and ``gradients`` stand in the order of the stage's incoming messages."""

    def forward(self, operation: Operation, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        """The stage's output payload; empty after the stage with the loss."""
        ...

    def backward(self, operation: Operation, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        """B or BW: gradients of the forward's inputs, one payload per forward input."""
        ...

    def weight(self, operation: Operation, unit: Unit, strategy: str) -> None:
        """W: the weight gradients its B left."""
        ...


class PayloadError(RuntimeError):
    """A stage gave something else than its plan says travels on; the message names both."""


@dataclass
class Position:
    """Where a rank stands in its plan; read by the watchdog from another thread."""

    rank: int
    plan: Plan | None = None
    index: int = 0
    waiting_for: Message | None = None
    iteration: int = 0

    def __str__(self) -> str:
        if self.plan is None:
            return f"pipeline rank {self.rank} is between iterations"
        actions = self.plan.actions[self.rank]
        if self.index >= len(actions):
            return f"pipeline rank {self.rank} has ended its plan of iteration {self.iteration}"
        text = f"pipeline rank {self.rank}, iteration {self.iteration}, action {self.index + 1} of {len(actions)}: "
        text += str(actions[self.index])
        if self.waiting_for is not None:
            peer = self.waiting_for.channel
            other = peer.source if peer.target == self.rank else peer.target
            text += f", waiting for pipeline rank {other}"
        return text


@dataclass
class _Mail:
    """Payloads between their arrival and their use, and transfers under way."""

    inbox: dict[Message, Tensors] = field(default_factory=dict)
    outbox: dict[Message, Tensors] = field(default_factory=dict)
    receiving: dict[Message, Transfer] = field(default_factory=dict)
    sending: dict[Message, Transfer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Route:
    """What an operation takes and gives. ``results[i]`` is the place, among what a backward returns, of the gradient
    that travels in ``outgoing[i]``; a forward gives the same to all."""

    unit: Unit
    incoming: tuple[Message, ...]
    outgoing: tuple[Message, ...]
    payloads: tuple[Payload, ...]
    results: tuple[int, ...]


LATEST_READING = 0.4
"""Share of a rank's actions after which work for the gaps waits for none any more: a plan has to follow from it."""


class Executor:
    """Runs plans on one pipeline rank."""

    def __init__(self, rank: int, transport: Transport, clock: Clock, *, alone: bool = True):
        """``alone``: no other rank has the same stages, which would have to use the same gaps."""
        self.position = Position(rank)
        self._rank = rank
        self._transport = transport
        self._clock = clock
        self._mail = _Mail()
        self._meanwhile: Iterator[object] = iter(())
        self._routes: dict[Operation, _Route] = {}
        self._sees_arrivals = alone and transport.sees_arrivals
        self._handlers: dict[Kind | CommunicationKind, Callable[..., None]] = {}
        for kind in (Kind.F, Kind.B, Kind.BW, Kind.W):
            self.register(kind, {Kind.F: self._forward, Kind.W: self._weight}.get(kind, self._backward))
        self.register(CommunicationKind.ISEND, self._isend)
        self.register(CommunicationKind.IRECV, self._irecv)
        self.register(CommunicationKind.WAIT_ISEND, self._wait_isend)
        self.register(CommunicationKind.WAIT_IRECV, self._wait_irecv)

    def register(self, kind: Kind | CommunicationKind, handler: Callable[..., None]) -> None:
        """Let ``handler(plan, runner, action)`` run all actions of a kind."""
        self._handlers[kind] = handler

    def run(self, plan: Plan, runner: StageRunner, iteration: int = 0, meanwhile: Iterator[None] | None = None) -> None:
        """Execute the rank's actions in order. The plan must have passed :func:`schedule.verify.verify`.

        ``meanwhile`` is work for the gaps: one step of it is done before each wait for a message, the rest at the end.
        Ranks with the same actions (a stage's tensor-parallel ones) do the same step at the same place. Where the
        transport sees what has arrived, and no such ranks have to agree, steps are done while a message is on its way.
        """
        self._mail = _Mail()
        self._meanwhile = iter(()) if meanwhile is None else meanwhile
        # Worked out here, in one go: between two operations, when all caches hold the last one's data, it takes longer.
        self._routes = {
            action.operation: self._route(plan, action.operation)
            for action in plan.actions[self._rank]
            if isinstance(action, Compute)
        }
        position = self.position
        position.plan, position.iteration, position.index = plan, iteration, 0
        for index, action in enumerate(plan.actions[self._rank]):
            position.index = index
            kind: Kind | CommunicationKind = action.operation.kind if isinstance(action, Compute) else action.kind
            self._handlers[kind](plan, runner, action)
        position.index = len(plan.actions[self._rank])
        for _ in self._meanwhile:
            pass
        position.plan = None

    # -- compute -------------------------------------------------------------------------------------------------
    def _forward(self, plan: Plan, runner: StageRunner, action: Compute) -> None:
        operation, route = action.operation, self._routes[action.operation]
        inputs = [self._mail.inbox.pop(m) for m in route.incoming]
        with self._clock.span(operation, route.unit):
            outputs = runner.forward(operation, route.unit, action.strategy, inputs)
        for message, payload in zip(route.outgoing, route.payloads, strict=True):
            self._deliver(message, payload, outputs)

    def _backward(self, plan: Plan, runner: StageRunner, action: Compute) -> None:
        operation, route = action.operation, self._routes[action.operation]
        gradients = [self._mail.inbox.pop(m) for m in route.incoming]
        with self._clock.span(operation, route.unit):
            results = runner.backward(operation, route.unit, action.strategy, gradients)
        for message, payload, place in zip(route.outgoing, route.payloads, route.results, strict=True):
            self._deliver(message, payload, results[place])

    def _weight(self, plan: Plan, runner: StageRunner, action: Compute) -> None:
        unit = self._routes[action.operation].unit
        with self._clock.span(action.operation, unit):
            runner.weight(action.operation, unit, action.strategy)

    def _route(self, plan: Plan, operation: Operation) -> _Route:
        taken, given = incoming(plan.graph, operation), outgoing(plan.graph, operation)
        places: tuple[int, ...] = ()
        if operation.kind in (Kind.B, Kind.BW):
            # One result per forward input; those whose producer does not train are dropped.
            forward = Operation(Kind.F, operation.module, operation.segment, operation.unit, operation.rank)
            sources = [replace(m.source, kind=Kind.B) for m in incoming(plan.graph, forward)]
            places = tuple(sources.index(m.target) for m in given)
        payloads = tuple(payload_of(plan, m) for m in given)
        return _Route(plan.graph.units[operation.unit], taken, given, payloads, places)

    def _deliver(self, message: Message, payload: Payload, tensors: Tensors) -> None:
        box = self._mail.inbox if message.target.rank == self._rank else self._mail.outbox
        box[message] = _as_planned(payload, tensors, message)

    # -- communicate ---------------------------------------------------------------------------------------------
    def _isend(self, plan: Plan, runner: StageRunner, action: Communicate) -> None:
        message = action.message
        self._mail.sending[message] = self._transport.send(message.channel, self._mail.outbox.pop(message))
        # Buffers of sends that have ended go back to the allocator now, not at the end of the iteration.
        for earlier in [m for m, transfer in self._mail.sending.items() if transfer.done()]:
            self._mail.sending[earlier] = _ENDED

    def _irecv(self, plan: Plan, runner: StageRunner, action: Communicate) -> None:
        message = action.message
        self._mail.receiving[message] = self._transport.receive(message.channel, payload_of(plan, message))

    def _wait_isend(self, plan: Plan, runner: StageRunner, action: Communicate) -> None:
        self._wait(self._mail.sending.pop(action.message), action.message)

    def _wait_irecv(self, plan: Plan, runner: StageRunner, action: Communicate) -> None:
        message = action.message
        transfer = self._mail.receiving.pop(message)
        self._use_gap(plan, transfer)
        self._mail.inbox[message] = self._wait(transfer, message)

    def _use_gap(self, plan: Plan, transfer: Transfer) -> None:
        with self._clock.reading():
            if not self._sees_arrivals:
                next(self._meanwhile, None)
                return
            late = self.position.index >= LATEST_READING * len(plan.actions[self._rank])
            while (late or not transfer.done()) and next(self._meanwhile, self) is not self:
                pass

    def _wait(self, transfer: Transfer, message: Message) -> Tensors:
        self.position.waiting_for = message
        tensors = transfer.wait()
        self.position.waiting_for = None
        return tensors


class _Ended:
    def wait(self) -> Tensors:
        return {}

    def done(self) -> bool:
        return True


_ENDED = _Ended()


def _as_planned(payload: Payload, tensors: Tensors, message: Message) -> Tensors:
    """The tensors that travel, in the plan's order and without their graph. Raises PayloadError: the other end has
    buffers of the planned shapes and would wait for ever, or take one tensor for another."""
    for spec in payload:
        given = tensors.get(spec.name)
        found = None if given is None else (tuple(given.shape), str(given.dtype).removeprefix("torch."))
        if found != (spec.shape, spec.dtype):
            raise PayloadError(f"{message}: the plan says {spec.name} is {spec.shape} {spec.dtype}, the stage gave "
                               f"{'none' if found is None else f'{found[0]} {found[1]}'}")  # fmt: skip
    return {spec.name: tensors[spec.name].detach() for spec in payload}


def payload_of(plan: Plan, message: Message) -> Payload:
    """Shapes of what a message carries; for gradients, of the tensors that have one."""
    source, target = message.source, message.target
    gradient = message.channel.gradient
    if gradient:
        source, target = target, source
    start, end = plan.graph.virtual_microbatch_of(source), plan.graph.virtual_microbatch_of(target)
    payload = plan.payload(start, end, source.rank)
    if payload is None:
        raise PayloadError(f"{message}: the plan doesn't say what it carries")
    return tuple(spec for spec in payload if spec.differentiable) if gradient else payload


def describe(action: Action) -> str:
    """Short name of an action for profilers, e.g. ``vision.0 F u3``."""
    if isinstance(action, Compute):
        operation = action.operation
        return f"{operation.module}.{operation.segment} {operation.kind.name} u{operation.unit}"
    return f"{action.kind} {action.message.channel}"
