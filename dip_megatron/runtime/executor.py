"""The executor: runs the actions of one rank in order.

It knows plans and messages but no models: an :class:`OperationRunner` computes, and a :class:`Transport` carries
messages. The state of an iteration is in :class:`Position` and the executor's letters, and is dropped at the end of the
iteration.
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
    """Computes operations. ``inputs`` and ``gradients`` are in the order of the operation's incoming messages."""

    def forward(self, operation: Operation, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        """Run F and return its output payload, which is empty for the operation that computes the loss."""
        ...

    def backward(self, operation: Operation, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        """Run B or BW and return the gradients of the forward's inputs, one payload for each."""
        ...

    def weight(self, operation: Operation, unit: Unit, strategy: str) -> None:
        """Run W: compute the weight gradients that the B before it deferred."""
        ...

    def reduce(self, module: str, segment: int) -> None:
        """Start the reduction of this rank's gradients of a chunk over data-parallel replicas."""
        ...


class PayloadError(RuntimeError):
    """An operation returned other tensors than its plan says; the message names both."""


@dataclass
class Position:
    """The progress of a rank through its plan. The watchdog reads it from another thread."""

    rank: int
    plan: Plan | None = None
    index: int = 0
    waiting_for: Message | None = None
    iteration: int = 0
    begun: bool = False
    reads: bool = False
    """Whether the rank is reading the next iteration's microbatches."""
    global_ranks: Sequence[int] = ()
    """Global ranks of the pipeline's ranks; empty if there is only one pipeline."""

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
    """One end of a message of the iteration.

    ``tensors`` is set between arrival and use (receiver) or between computation and sending (sender); ``transfer`` is
    set while a transfer is in progress. Everything that depends only on the plan is computed in advance, because
    between two operations the caches hold the operation's data and every access to another object is slow.
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
        """Return the tensors and release them here."""
        tensors, self.tensors = self.tensors, None
        assert tensors is not None, self.message
        return tensors

    def put(self, tensors: Tensors) -> None:
        """Keep the operation's tensors that this message carries, in the plan's order and detached from their graph.

        Raises:
            PayloadError: If a tensor is missing, or differs from the plan in shape or dtype. The receiver has buffers
                of the planned shapes and would otherwise hang or confuse tensors.
        """
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
    """An operation with its incoming (``taken``) and outgoing (``given``) messages.

    For a backward, ``places[i]`` is the index, in the list of gradients it returns, of the gradient that ``given[i]``
    carries. A forward sends the same output with all its messages.
    """

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
            # A backward returns one gradient for each forward input; those of producers that don't train are dropped.
            forward = Operation(Kind.F, operation.module, operation.segment, operation.unit, operation.rank)
            sources = [replace(m.source, kind=Kind.B) for m in incoming(plan.graph, forward)]
            self.places = [sources.index(m.target) for m in given]


LATEST_READING = 0.4
"""Share of a rank's actions after which the work for gaps no longer waits for a gap. The next iteration is planned from
its result and must have time for that."""


class Executor:
    """Runs plans on one pipeline rank."""

    def __init__(self, rank: int, transport: Transport, clock: Clock, *, alone: bool = True):
        """Create an executor for one pipeline rank.

        Args:
            rank: This process's pipeline rank.
            transport: Carries messages to the other pipeline ranks.
            clock: Measures the operations.
            alone: Whether no other rank runs the same actions. Tensor-parallel ranks do, and all of them must use the
                same gaps.
        """
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
        """Execute the rank's actions in order. The plan must have passed :func:`dip_megatron.core.verify.verify`.

        Args:
            plan: The plan of the iteration.
            runner: Computes the operations.
            iteration: Number of the iteration, for reports.
            meanwhile: Work to do in gaps. One step of it is done before each wait for a message, and the rest at the
                end, so that ranks with the same actions do the same step at the same place. If the transport sees
                arrivals and no such ranks exist, steps are done as long as a message hasn't arrived.
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
        position.reads = True  # Left set if the work fails, for the report.
        for _ in self._meanwhile:
            pass
        position.plan, position.reads = None, False
        self._letters = {}

    def _steps(self, plan: Plan, runner: OperationRunner) -> list[tuple[Callable[[Any], None], Any]]:
        """Return, for each action of the rank, the function that executes it and its argument."""

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
        # Free the buffers of completed sends now instead of at the end of the iteration.
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
    """Return the specifications of the tensors that a message carries; for gradients, only of differentiable tensors.

    Raises:
        PayloadError: If the plan doesn't say what the message carries.
    """
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
