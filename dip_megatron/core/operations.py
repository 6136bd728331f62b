"""Stages and operations: the words every other package speaks.

A *stage* is one model chunk's work for one sub-microbatch (unit): (module, segment, unit, rank). An *operation* is one
of the things a rank can do for a stage: its forward, its backward, or the two halves of a split backward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What a rank computes for a stage.

    ``B`` is the gradient with respect to the stage's input, ``W`` the gradient of its weights, ``BW`` both at once (an
    unsplit backward). A stage has either one ``BW``, or a ``B`` followed (not necessarily at once) by a ``W``. A stage
    whose chunk is frozen has a ``B`` alone, or no backward at all where nothing before it trains.
    """

    F = 0
    B = 1
    W = 2
    BW = 3


@dataclass(frozen=True, slots=True, order=True)
class Operation:
    """One operation of one stage; ``str()`` and :meth:`parse` are exact inverses, e.g. ``F:vision.0#3@1``."""

    kind: Kind
    module: str
    segment: int
    unit: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind.name}:{self.module}.{self.segment}#{self.unit}@{self.rank}"

    @classmethod
    def parse(cls, text: str) -> Operation:
        """Inverse of ``str()``. Raises ValueError naming ``text``."""
        match = _OPERATION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"not an operation: {text!r} (expected KIND:MODULE.SEGMENT#UNIT@RANK, e.g. F:vision.0#3@1)"
            )
        kind, module, segment, unit, rank = match.groups()
        return cls(Kind[kind], module, int(segment), int(unit), int(rank))


_OPERATION = re.compile(r"(F|B|W|BW):([A-Za-z_][\w-]*)\.(\d+)#(\d+)@(\d+)")
