"""The order of collectives on every rank: written down, and compared."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

Log = list[tuple[str, tuple[int, ...]]]
"""Name and ranks of each collective that a rank's main thread began."""
_NAMES = (
    "all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather",
    "reduce_scatter", "broadcast", "_all_gather_base", "_reduce_scatter_base",
)  # fmt: skip


@contextlib.contextmanager
def recorded() -> Iterator[Log]:
    """Within, the collectives among several ranks that this process begins, but for threads that talk of plans."""
    from megatron.core.tensor_parallel import layers, mappings

    log: Log = []
    inside = False

    def noting(name: str, original: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or threading.current_thread() is not threading.main_thread():
                return original(*args, **kwargs)
            members = tuple(dist.get_process_group_ranks(kwargs.get("group")))
            if len(members) > 1:
                log.append((name, members))
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return collective

    held = [(dist, name, getattr(dist, name)) for name in _NAMES if hasattr(dist, name)]
    held += [
        (module, name, getattr(module, name))
        for module in (layers, mappings)
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
        if hasattr(module, name)
    ]
    for module, name, original in held:
        setattr(module, name, noting(name, original))
    try:
        yield log
    finally:
        for module, name, original in held:
            setattr(module, name, original)


def disagreement(logs: Sequence[Log]) -> str:
    """The first place where two ranks (``logs[rank]``) come to their common collectives in other orders: what
    devices that run all of them one after the other can't follow. Empty if there is none."""
    for one, other in itertools.combinations(range(len(logs)), 2):
        shared = [[entry for entry in log if one in entry[1] and other in entry[1]] for log in (logs[one], logs[other])]
        for place, (a, b) in enumerate(itertools.zip_longest(*shared)):
            if a != b:
                return f"ranks {one} and {other}, common collective {place}: {a} and {b}"
    return ""


def stuck(logs: Sequence[Log]) -> str:
    """Where ranks stand once they have run their collectives one after the other, each once all of its members have
    come to it: what the strictest of devices would do. Empty if all end."""
    place = [0] * len(logs)

    def head(rank: int) -> tuple[str, tuple[int, ...]] | None:
        return logs[rank][place[rank]] if place[rank] < len(logs[rank]) else None

    moving = True
    while moving:
        moving = False
        for rank in range(len(logs)):
            while (here := head(rank)) is not None and all(head(member) == here for member in here[1]):
                for member in here[1]:
                    place[member] += 1
                moving = True
    standing = [f"rank {rank} at {head(rank)}" for rank in range(len(logs)) if head(rank) is not None]
    return ", ".join(standing)


def reductions_before(log: Log, last: str) -> int:
    """How many reductions of gradients a rank begins before the last collective of that name."""
    names = [name for name, _ in log]
    return names[: len(names) - names[::-1].index(last)].count("all_reduce") if last in names else 0
