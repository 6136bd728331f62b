"""What a rank does, one action after the other: compute, and the four halves of point-to-point communication.

The actions are DynaPipe's, as the paper uses them (section 6): forward, backward, isend, irecv, wait_isend, wait_irecv.
Their text form round-trips exactly::

    F:vision.0#3@1{full:2}
    isend F:vision.0#3@1>F:vision.0#3@2
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .operations import Kind, Operation


@dataclass(frozen=True, slots=True, order=True)
class Channel:
    """One directed stream of messages with an order of its own: activations and gradients never share one."""

    source: int
    target: int
    gradient: bool

    def __str__(self) -> str:
        return f"{self.source}->{self.target} {'gradients' if self.gradient else 'activations'}"


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """An edge of the stage graph that crosses ranks: the output of ``source`` that ``target`` waits for. Backward
    messages name both ends with kind B, whether the plan splits the backward or not."""

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
            raise ValueError(f"not a message: {text!r} (expected STAGE>STAGE)")
        return cls(Operation.parse(source), Operation.parse(target))


@dataclass(frozen=True, slots=True)
class Compute:
    """Run one operation of one stage with a memory strategy (of the stage pair; named on F, repeated on B)."""

    operation: Operation
    strategy: str = "none"

    def __str__(self) -> str:
        return f"{self.operation}" if self.strategy == "none" else f"{self.operation}{{{self.strategy}}}"


class CommunicationKind(StrEnum):
    """The two ends of a transfer, each begun and later waited for."""

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


Action = Compute | Communicate


def parse_action(text: str) -> Action:
    """Inverse of ``str(action)``. Raises ValueError naming ``text``."""
    head, separator, rest = text.partition(" ")
    if separator:
        if head not in set(CommunicationKind):
            raise ValueError(f"unknown action {head!r} in {text!r}")
        return Communicate(CommunicationKind(head), Message.parse(rest))
    key, brace, strategy = text.partition("{")
    if brace and not strategy.endswith("}"):
        raise ValueError(f"not an action: {text!r} (missing closing brace)")
    return Compute(Operation.parse(key), strategy[:-1] if brace else "none")
