"""torch's process groups and stores from the inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .names import Name, Topic

TOPIC = Topic(
    "process groups that only their members create, and the job's store",
    "torch",
    "2.13.0, 2.15.0",
    "pipelines can't set up their communication: no run under DIP begins",
    (
        Name("torch.distributed.distributed_c10d:_world.pg_group_ranks"),
        Name("torch.distributed.distributed_c10d:_hash_ranks_to_str", ("ranks",)),
        Name("torch.distributed.distributed_c10d:_get_default_store", ()),
        Name(
            "torch.distributed:new_group", ("ranks", "*", "timeout", "backend", "use_local_synchronization")
        ),
    ),
)  # fmt: skip


def groups_of(members: Sequence[int]) -> int:
    """How many groups of exactly these global ranks this process knows."""
    known = distributed_c10d._world.pg_group_ranks.values()
    return sum(sorted(ranks) == list(members) for ranks in known)


@contextmanager
def group_named(name: str) -> Iterator[None]:
    """Within, a group made with ``use_local_synchronization`` is found by its members under ``name``."""
    torchs = distributed_c10d._hash_ranks_to_str
    distributed_c10d._hash_ranks_to_str = lambda _: name
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = torchs


def shared_store() -> Any:
    """The rendezvous store of the default process group, which all ranks reach."""
    return dist.distributed_c10d._get_default_store()
