"""The actions of a rank: compute, the four halves of point-to-point communication and, for coupled replicas, starts of
gradient reductions.

The actions are those of DynaPipe, which the paper uses (section 6): forward, backward, isend, irecv, wait_isend,
wait_irecv. ``str()`` and :func:`parse_action` are exact inverses::

    F:vision.0#3@1{full:2}
    isend F:vision.0#3@1>F:vision.0#3@2
    reduce vision.0@1
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from .operations import Kind, Operation


@dataclass(frozen=True, slots=True, order=True)
class Channel:
    """A directed, ordered stream of messages between two ranks. Activations and gradients use separate channels."""

    source: int
    target: int
    gradient: bool

    def __str__(self) -> str:
        return f"{self.source}->{self.target} {'gradients' if self.gradient else 'activations'}"


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """An edge of the operation graph that crosses ranks: the output of ``source`` for which ``target`` waits. Messages
    of gradients name both ends with kind B, whether the plan splits the backward or not."""

    source: Operation
    target: Operation

    @property
    def channel(self) -> Channel:
        return Channel(self.source.rank, self.target.rank, self.source.kind != Kind.F)

    def __str__(self) -> str:
        return f"{self.source}>{self.target}"

    @classmethod
    def parse(cls, text: str) -> Message:
        source, separator, target = text.partition(">")
        if not separator:
            raise ValueError(f"not a message: {text!r} (expected OPERATION>OPERATION)")
        return cls(Operation.parse(source), Operation.parse(target))


@dataclass(frozen=True, slots=True)
class Compute:
    """Run one operation with a memory strategy. The operations of one node name the same strategy."""

    operation: Operation
    strategy: str = "none"

    def __str__(self) -> str:
        return f"{self.operation}" if self.strategy == "none" else f"{self.operation}{{{self.strategy}}}"


class CommunicationKind(StrEnum):
    """Begin or await one end of a transfer."""

    ISEND = "isend"
    IRECV = "irecv"
    WAIT_ISEND = "wait_isend"
    WAIT_IRECV = "wait_irecv"


@dataclass(frozen=True, slots=True)
class Communicate:
    """Begin or await one end of a message."""

    kind: CommunicationKind
    message: Message

    def __str__(self) -> str:
        return f"{self.kind} {self.message}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Start to reduce the gradients of a chunk over data-parallel replicas. Nothing waits for it before the end of the
    plan. See :mod:`.reductions`."""

    module: str
    segment: int
    rank: int

    def __str__(self) -> str:
        return f"{_REDUCE} {self.module}.{self.segment}@{self.rank}"


_REDUCE = "reduce"
_CHUNK = re.compile(r"([A-Za-z_][\w-]*)\.(\d+)@(\d+)")

Action = Compute | Communicate | Reduce


def parse_action(text: str) -> Action:
    """Parse ``str(action)``. Raises ValueError naming ``text``."""
    head, separator, rest = text.partition(" ")
    if head == _REDUCE:
        match = _CHUNK.fullmatch(rest)
        if match is None:
            raise ValueError(f"not a chunk: {rest!r} in {text!r} (expected MODULE.SEGMENT@RANK, e.g. vision.0@1)")
        return Reduce(match[1], int(match[2]), int(match[3]))
    if separator:
        if head not in set(CommunicationKind):
            raise ValueError(f"unknown action {head!r} in {text!r}")
        return Communicate(CommunicationKind(head), Message.parse(rest))
    key, brace, strategy = text.partition("{")
    if brace and not strategy.endswith("}"):
        raise ValueError(f"not an action: {text!r} (missing closing brace)")
    return Compute(Operation.parse(key), strategy[:-1] if brace else "none")
