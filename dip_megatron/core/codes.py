"""Actions as integers. Plans store, send and check these codes; :mod:`.actions` has the objects that people read.

With S virtual microbatches and E edges (:attr:`OperationGraph.edges`), codes below 4S are operations, ``kind * S + s``.
They are followed by the sends, receives, waits for sends and waits for receives of the 2E messages: message e is the
output that travels along edge e, and message E + e the gradient that travels back. The last codes are the starts of
reductions, one for each (module, segment), numbered as the modules list them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from .actions import Action, Communicate, CommunicationKind, Compute, Message, Reduce
from .graph import GraphError, Ints, OperationGraph
from .modules import chunks_of
from .operations import Kind, Operation

COMMUNICATIONS = (
    CommunicationKind.ISEND,
    CommunicationKind.IRECV,
    CommunicationKind.WAIT_ISEND,
    CommunicationKind.WAIT_IRECV,
)


def first_reduction(graph: OperationGraph) -> int:
    """The code of the first reduction."""
    return 4 * graph.virtual_microbatches + 4 * 2 * len(graph.edges.source)


def code_count(graph: OperationGraph) -> int:
    """The number of codes; every code is below it."""
    return first_reduction(graph) + len(chunks_of(graph.modules))


class Decoder:
    """Converts the codes of one graph to actions, and back."""

    def __init__(self, graph: OperationGraph):
        self._graph = graph
        self._edges = len(graph.edges.source)
        self._reductions = first_reduction(graph)
        self._chunks = chunks_of(graph.modules)
        self._messages: dict[int, Message] = {}

    def action(self, code: int, rank: int) -> Action:
        """The action of ``code`` on ``rank``."""
        graph, virtual_microbatches = self._graph, self._graph.virtual_microbatches
        if code < 4 * virtual_microbatches:
            kind, virtual_microbatch = divmod(code, virtual_microbatches)
            return Compute(
                graph.operation(Kind(kind), virtual_microbatch, rank), graph.strategy_name(0, virtual_microbatch, rank)
            )
        if code >= self._reductions:
            return Reduce(*self._chunks[code - self._reductions], rank)
        kind, message = divmod(code - 4 * virtual_microbatches, 2 * self._edges)
        return Communicate(COMMUNICATIONS[kind], self.message(message))

    def message(self, number: int) -> Message:
        """Message ``number``. Both ends of a gradient are named B."""
        if number not in self._messages:
            graph, edges = self._graph, self._graph.edges
            gradient, e = divmod(number, self._edges)
            kind = Kind.B if gradient else Kind.F
            ends = [graph.operation(kind, *divmod(int(n), graph.ranks)) for n in (edges.source[e], edges.target[e])]
            self._messages[number] = Message(*(reversed(ends) if gradient else ends))
        return self._messages[number]

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], int]:
        ends = zip(self._graph.edges.source.tolist(), self._graph.edges.target.tolist(), strict=True)
        return {pair: e for e, pair in enumerate(ends)}

    def _node(self, operation: Operation) -> int:
        return self._graph.virtual_microbatch_of(operation) * self._graph.ranks + operation.rank

    def code(self, action: Action) -> int:
        """Inverse of :meth:`action`. Raises GraphError for stages and messages that the graph doesn't have."""
        graph, virtual_microbatches = self._graph, self._graph.virtual_microbatches
        if isinstance(action, Compute):
            virtual_microbatch = graph.virtual_microbatch_of(action.operation)
            expected = graph.strategy_name(0, virtual_microbatch, action.operation.rank)
            if action.strategy != expected:
                raise GraphError(f"{action}: strategy differs from the graph's {expected!r}")
            return int(action.operation.kind) * virtual_microbatches + virtual_microbatch
        if isinstance(action, Reduce):
            if (action.module, action.segment) not in self._chunks:
                raise GraphError(f"{action}: the model has no such chunk")
            return self._reductions + self._chunks.index((action.module, action.segment))
        message = action.message
        ends = [self._node(message.source), self._node(message.target)]
        gradient = message.channel.gradient
        edge = self._numbers.get((ends[1], ends[0]) if gradient else (ends[0], ends[1]))
        kinds = {message.source.kind, message.target.kind}
        if edge is None or kinds != {Kind.B if gradient else Kind.F}:
            raise GraphError(f"{action}: nothing travels between these operations")
        return (
            4 * virtual_microbatches
            + 2 * self._edges * COMMUNICATIONS.index(action.kind)
            + gradient * self._edges
            + edge
        )


class RankActions(Sequence[tuple[Action, ...]]):
    """The actions of all ranks, ``[rank][i]``, decoded on access."""

    def __init__(self, graph: OperationGraph, codes: tuple[Ints, ...]):
        self._decoder = Decoder(graph)
        self._codes = codes
        self._decoded: dict[int, tuple[Action, ...]] = {}

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, rank: int) -> tuple[Action, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[Action, ...], ...]: ...
    def __getitem__(self, rank: int | slice) -> tuple[Action, ...] | tuple[tuple[Action, ...], ...]:
        if isinstance(rank, slice):
            return tuple(self[r] for r in range(len(self))[rank])
        rank = range(len(self))[rank]
        if rank not in self._decoded:
            self._decoded[rank] = tuple(self._decoder.action(code, rank) for code in self._codes[rank].tolist())
        return self._decoded[rank]

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        return (self[rank] for rank in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


def encode(graph: OperationGraph, actions: Sequence[Sequence[Action]]) -> tuple[Ints, ...]:
    """The codes of all ranks' actions. Raises GraphError ``rank R, action I: reason`` for an action that the graph does
    not have."""
    decoder = Decoder(graph)
    codes = []
    for rank, line in enumerate(actions):
        numbers = np.empty(len(line), dtype=np.int32)
        for i, action in enumerate(line):
            whose = action.operation.rank if isinstance(action, Compute) else rank
            whose = action.rank if isinstance(action, Reduce) else whose
            if whose != rank:
                raise GraphError(f"rank {rank}, action {i} ({action}): is rank {whose}'s")
            try:
                numbers[i] = decoder.code(action)
            except GraphError as error:
                raise GraphError(f"rank {rank}, action {i}: {error}") from error
        codes.append(numbers)
    return tuple(codes)
