"""Tokens that scripts count as they read batches, from which loops log floating-point operations and throughput."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .names import Name, Topic

_TRAINING = "megatron.training.training"
_MEGATRONS = {"_seqlen_stats_in_iteration": None, "_seqlen_stats_active": False}
_BRIDGES = {
    "_flops_seqlen_sum": 0, "_flops_seqlen_sq_sum": 0, "_flops_vision_patches": 0, "_flops_cross_seqlen_sum": 0,
    "_flops_cross_seqlen_product_sum": 0, "_flops_requires_global_reduce": False,
}  # fmt: skip
TOPIC = Topic(
    "throughput of packed sequences in Megatron's log",
    "megatron.training",
    "0.19.2",
    "--log-throughput counts packed sequences that are read ahead, and more than once",
    tuple(Name(f"{_TRAINING}:{name}", first="0.19") for name in _MEGATRONS),
)
BRIDGE = Topic(
    "throughput in Megatron-Bridge's log",
    "megatron-bridge",
    "0.6.2",
    "its log counts tokens that are read ahead, and more than once",
    (Name("megatron.bridge.training.utils.flop_utils:accumulate_flops_metadata"),),
)


@dataclass
class Counted:
    """What a script's ``forward_step`` has counted, by where it counts."""

    sums: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)


class TokenCounts:
    """What the scripts of one training loop count."""

    def __init__(self, state: Any = None):
        """``state`` is that of Megatron-Bridge's loop, in which its ``forward_step`` counts (None: of another loop).
        Megatron's counts stand in its module, which may load later."""
        self._state = state

    @contextmanager
    def set_aside(self) -> Iterator[Counted]:
        """Within, what is counted doesn't go to the iteration that runs; afterwards it is in what this gives."""
        counted, before = Counted(), [(place, _values(place, zeros)) for place, zeros in self._places()]
        for place, zeros in self._places():
            _set(place, {name: zeros[name] for name in _values(place, zeros)})
        try:
            yield counted
        finally:
            for place, held in before:
                counted.sums.append((place, _values(place, held)))
                _set(place, held)

    def count(self, counted: Counted) -> None:
        """Let it go to the iteration that runs."""
        for place, sums in counted.sums:
            known = _values(place, sums)
            _set(place, {name: _sum(known[name], value) for name, value in sums.items() if name in known})

    def _places(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Who counts, and what stands there before anything is counted."""
        if _TRAINING in sys.modules:
            yield sys.modules[_TRAINING], _MEGATRONS
        if self._state is not None:
            yield self._state, _BRIDGES


def _sum(known: Any, more: Any) -> Any:
    if isinstance(more, bool):
        return known or more
    return known if more is None else more if known is None else known + more


def _values(place: Any, names: dict[str, Any]) -> dict[str, Any]:
    """Those that are there: older releases count nothing, or less."""
    return {name: getattr(place, name) for name in names if hasattr(place, name)}


def _set(place: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(place, name, value)
