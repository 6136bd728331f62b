"""Operations: what one rank computes for one unit on one chunk. ``docs/glossary.md`` defines these words.

A *node* is one unit on one chunk, given by (module, segment, unit, rank). Its operations are a forward and a backward,
or a forward and the two halves of a split backward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What an operation computes.

    ``B`` is the gradient of the node's input, ``W`` the gradient of its chunk's weights, and ``BW`` both at once (a
    backward that is not split). A node has either one ``BW``, or a ``B`` and, at any later time, a ``W``. A node whose
    chunk is frozen has only a ``B``, or no backward at all if nothing before it trains.
    """

    F = 0
    B = 1
    W = 2
    BW = 3


@dataclass(frozen=True, slots=True, order=True)
class Operation:
    """One operation. ``str()`` and :meth:`parse` are exact inverses, e.g. ``F:vision.0#3@1``."""

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
