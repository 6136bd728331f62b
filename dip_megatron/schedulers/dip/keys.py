"""Keys: the priorities and rules from which the list scheduler makes a schedule, and which the search changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats
from ...core.simulate.compiled import compiled
from .problem import Problem

ALTERNATE, LEAN_AT_ONCE, FLAGS = 0, 1, 2
WAIT_WEIGHT, WAIT_BETTER, WAIT_LEAN, WAITS = 0, 1, 2, 3


class Keys(NamedTuple):
    """Everything that a list schedule depends on beside the graph; what the search changes.

    ``order_forward``, ``order_backward`` ``[G]`` and ``shift_forward``, ``shift_backward`` ``[S]`` are in units of one
    microbatch; ``offset`` ``[P]``, large: backwards first. ``waits``: how long a rank idles for a known arrival rather
    than start a weight gradient, a less urgent operation, or a forward with a leaner strategy, each as a multiple of
    that operation's length. ``base`` ``[N]``: the fastest strategy a stage may use. ``split`` ``[N]``: whether its
    backward is split. ``flags``: ``ALTERNATE`` forwards and backwards when both can run (the paper's rule);
    ``LEAN_AT_ONCE``: use a leaner strategy whenever that admits a forward, not only when the rank would idle.
    ``window`` ``[P]``: on a rank whose memory is limited only so many sinks, from the first unfinished one in order,
    may be under way. ``release`` ``[S]``: seconds before which a virtual microbatch's forwards don't start.
    """

    order_forward: Floats
    order_backward: Floats
    shift_forward: Floats
    shift_backward: Floats
    offset: Floats
    waits: Floats
    base: NDArray[np.int8]
    split: NDArray[np.bool_]
    flags: NDArray[np.bool_]
    window: Floats
    release: Floats


def make_keys(q: Problem, split: bool) -> Keys:
    """Natural order of microbatches, fastest strategies, no waiting."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    order = np.arange(q.groups, dtype=np.float64)
    return Keys(
        order_forward=order,
        order_backward=order.copy(),
        shift_forward=np.zeros(virtual_microbatches),
        shift_backward=np.zeros(virtual_microbatches),
        offset=np.zeros(ranks),
        waits=np.zeros(WAITS),
        base=np.zeros(virtual_microbatches * ranks, dtype=np.int8),
        split=q.graph.has_weight & split,
        flags=np.zeros(FLAGS, dtype=np.bool_),
        window=np.full(ranks, float(len(q.reservation))),
        release=np.zeros(virtual_microbatches),
    )


def copy_keys(keys: Keys) -> Keys:
    """A copy that shares no memory."""
    copies: list[Any] = [a.copy() for a in keys]
    return Keys(*copies)


@compiled
def assign(target: NDArray[Any], source: NDArray[Any]) -> None:
    """Overwrite a vector (slices would allocate)."""
    for i in range(len(target)):
        target[i] = source[i]


@compiled
def assign_keys(target: Keys, source: Keys) -> None:
    """Overwrite ``target`` with ``source``."""
    assign(target.order_forward, source.order_forward)
    assign(target.order_backward, source.order_backward)
    assign(target.shift_forward, source.shift_forward)
    assign(target.shift_backward, source.shift_backward)
    assign(target.offset, source.offset)
    assign(target.waits, source.waits)
    assign(target.base, source.base)
    assign(target.split, source.split)
    assign(target.flags, source.flags)
    assign(target.window, source.window)
    assign(target.release, source.release)
