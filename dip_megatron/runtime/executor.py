"""The executor: runs one rank's actions, one after the other.

It knows plans and messages, not models: a :class:`OperationRunner` computes, a :class:`Transport` carries. All state of
an iteration lives in :class:`Position` and the executor's letters, and is gone at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from ..core import Communicate, CommunicationKind, Compute, Kind, Message, Operation, Payload, Plan, Reduce, Unit
from ..core.lower import incoming, outgoing
from .clock import Clock
from .transport import Tensors, Transfer, Transport


class OperationRunner(Protocol):
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

    def reduce(self, module: str, segment: int) -> None:
        """Start to reduce the gradients of this rank's chunk over replicas."""
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
    begun: bool = False
    reads: bool = False
    """Whether it does what is left to the gaps: it reads the next iteration's microbatches."""
    global_ranks: Sequence[int] = ()
    """Of the pipeline's ranks, where there are several pipelines."""

    def __str__(self) -> str:
        if self.plan is None:
            return f"pipeline rank {self.rank} is {'between iterations' if self.begun else 'not training yet'}"
        actions = self.plan.actions[self.rank]
        reads = ", reading the next iteration's microbatches" if self.reads else ""
        if self.index >= len(actions):
            return f"pipeline rank {self.rank} has ended its plan of iteration {self.iteration}{reads}"
        text = f"pipeline rank {self.rank}, iteration {self.iteration}, action {self.index + 1} of {len(actions)}: "
        text += str(actions[self.index]) + reads
        if self.waiting_for is not None:
            peer = self.waiting_for.channel
            other = peer.source if peer.target == self.rank else peer.target
            text += f", waiting for pipeline rank {other}"
            text += f" (global rank {self.global_ranks[other]})" if self.global_ranks else ""
        return text


class _Letter:
    """A message of an iteration, at one of its ends. ``tensors`` are here between their arrival and their use, or
    between their making and their sending; ``transfer`` is under way.

    All that can be worked out beforehand is: between two operations, when all caches hold the last one's data, every
    object that is looked at takes its time.
    """

    __slots__ = ("channel", "expected", "message", "payload", "tensors", "transfer")

    def __init__(self, plan: Plan, message: Message):
        self.message = message
        self.channel = message.channel
        self.payload = payload_of(plan, message)
        self.expected = [(spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in self.payload]
        self.tensors: Tensors | None = None
        self.transfer: Transfer | None = None

    def take(self) -> Tensors:
        """The tensors, held here no longer."""
        tensors, self.tensors = self.tensors, None
        assert tensors is not None, self.message
        return tensors

    def put(self, tensors: Tensors) -> None:
        """Those of a stage's tensors that travel, in the plan's order and without their graph. Raises PayloadError: the
        other end has buffers of the planned shapes and would wait for ever, or take one tensor for another."""
        found: Tensors = {}
        for name, shape, dtype in self.expected:
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
                given = "none" if tensor is None else f"{tuple(tensor.shape)} {_dtype(tensor.dtype)}"
                raise PayloadError(
                    f"{self.message}: the plan says {name} is {shape} {_dtype(dtype)}, the stage gave {given}"
                )
            found[name] = tensor.detach()
        self.tensors = found


class _Work:
    """An operation, with what it takes and gives. ``places[i]`` is where, among what a backward returns, the gradient
    is that travels in ``given[i]``; a forward gives the same to all."""

    __slots__ = ("given", "operation", "places", "strategy", "taken", "unit")

    def __init__(self, plan: Plan, action: Compute, letters: Callable[[Message], _Letter]):
        operation = self.operation = action.operation
        self.unit: Unit = plan.graph.units[operation.unit]
        self.strategy = action.strategy
        given = outgoing(plan.graph, operation)
        self.taken = [letters(m) for m in incoming(plan.graph, operation)]
        self.given = [letters(m) for m in given]
        self.places: list[int] = []
        if operation.kind in (Kind.B, Kind.BW):
            # One result per forward input; those whose producer does not train are dropped.
            forward = Operation(Kind.F, operation.module, operation.segment, operation.unit, operation.rank)
            sources = [replace(m.source, kind=Kind.B) for m in incoming(plan.graph, forward)]
            self.places = [sources.index(m.target) for m in given]


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
        self._sees_arrivals = alone and transport.sees_arrivals
        self._letters: dict[Message, _Letter] = {}
        self._sending: list[_Letter] = []
        self._meanwhile: Iterator[object] = iter(())
        self._latest_reading = 0.0

    def run(
        self, plan: Plan, runner: OperationRunner, iteration: int = 0, meanwhile: Iterator[None] | None = None
    ) -> None:
        """Execute the rank's actions in order. The plan must have passed :func:`schedule.verify.verify`.

        ``meanwhile`` is work for the gaps: one step of it is done before each wait for a message, the rest at the end.
        Ranks with the same actions (a stage's tensor-parallel ones) do the same step at the same place. Where the
        transport sees what has arrived, and no such ranks have to agree, steps are done while a message is on its way.
        """
        self._letters, self._sending = {}, []
        self._meanwhile = iter(()) if meanwhile is None else meanwhile
        actions = plan.actions[self._rank]
        self._latest_reading = LATEST_READING * len(actions)
        position = self.position
        position.plan, position.iteration, position.index, position.begun = plan, iteration, 0, True
        steps = self._steps(plan, runner)
        self._transport.open({a.message.channel for a in actions if isinstance(a, Communicate)})
        for index, (run, what) in enumerate(steps):
            position.index = index
            run(what)
        position.index = len(actions)
        position.reads = True  # still so where that fails
        for _ in self._meanwhile:
            pass
        position.plan, position.reads = None, False
        self._letters = {}

    def _steps(self, plan: Plan, runner: OperationRunner) -> list[tuple[Callable[[Any], None], Any]]:
        """What to do for each action, and with what."""

        def letter(message: Message) -> _Letter:
            known = self._letters.get(message)
            if known is None:
                known = self._letters[message] = _Letter(plan, message)
            return known

        communicate = {
            CommunicationKind.ISEND: self._isend,
            CommunicationKind.IRECV: self._irecv,
            CommunicationKind.WAIT_ISEND: self._wait_isend,
            CommunicationKind.WAIT_IRECV: self._wait_irecv,
        }
        compute = {Kind.F: self._forward, Kind.B: self._backward, Kind.BW: self._backward, Kind.W: self._weight}
        steps: list[tuple[Callable[[Any], None], Any]] = []
        for action in plan.actions[self._rank]:
            if isinstance(action, Compute):
                run = partial(compute[action.operation.kind], runner)
                steps.append((run, _Work(plan, action, letter)))
            elif isinstance(action, Reduce):
                steps.append((partial(self._reduce, runner), action))
            else:
                steps.append((communicate[action.kind], letter(action.message)))
        return steps

    # -- compute -------------------------------------------------------------------------------------------------
    def _forward(self, runner: OperationRunner, work: _Work) -> None:
        inputs = [letter.take() for letter in work.taken]
        started = self._clock.start()
        outputs = runner.forward(work.operation, work.unit, work.strategy, inputs)
        self._clock.stop(work.operation, work.unit, started)
        for letter in work.given:
            letter.put(outputs)

    def _backward(self, runner: OperationRunner, work: _Work) -> None:
        gradients = [letter.take() for letter in work.taken]
        started = self._clock.start()
        results = runner.backward(work.operation, work.unit, work.strategy, gradients)
        self._clock.stop(work.operation, work.unit, started)
        for letter, place in zip(work.given, work.places, strict=True):
            letter.put(results[place])

    def _weight(self, runner: OperationRunner, work: _Work) -> None:
        started = self._clock.start()
        runner.weight(work.operation, work.unit, work.strategy)
        self._clock.stop(work.operation, work.unit, started)

    @staticmethod
    def _reduce(runner: OperationRunner, action: Reduce) -> None:
        runner.reduce(action.module, action.segment)

    # -- communicate ---------------------------------------------------------------------------------------------
    def _isend(self, letter: _Letter) -> None:
        letter.transfer = self._transport.send(letter.channel, letter.take())
        self._sending.append(letter)
        # Buffers of sends that have ended go back to the allocator now, not at the end of the iteration.
        for earlier in [x for x in self._sending if x.transfer is not None and x.transfer.done()]:
            earlier.transfer = None
            self._sending.remove(earlier)

    def _irecv(self, letter: _Letter) -> None:
        letter.transfer = self._transport.receive(letter.channel, letter.payload)

    def _wait_isend(self, letter: _Letter) -> None:
        if letter.transfer is not None:
            self._wait(letter, letter.transfer)
            self._sending.remove(letter)

    def _wait_irecv(self, letter: _Letter) -> None:
        transfer = letter.transfer
        assert transfer is not None, letter.message
        self._use_gap(transfer)
        letter.tensors = self._wait(letter, transfer)

    def _use_gap(self, transfer: Transfer) -> None:
        with self._clock.reading():
            self.position.reads = True
            if self._sees_arrivals:
                late = self.position.index >= self._latest_reading
                while (late or not transfer.done()) and next(self._meanwhile, self) is not self:
                    pass
            else:
                next(self._meanwhile, None)
            self.position.reads = False

    def _wait(self, letter: _Letter, transfer: Transfer) -> Tensors:
        self.position.waiting_for = letter.message
        tensors = transfer.wait()
        self.position.waiting_for = letter.transfer = None
        return tensors


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


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
