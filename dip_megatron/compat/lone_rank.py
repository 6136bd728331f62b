"""One process that takes itself for the first rank of a job: torch's ``fake`` process groups, whose collectives return
at once and move nothing.

Importing ``fake_pg`` registers their backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from .names import Name, Topic

TOPIC = Topic(
    "process groups that move nothing",
    "torch",
    "2.13.0, 2.15.0",
    "`dip estimate` can't run a script, `dip rehearse` no job",
    (Name("torch.testing._internal.distributed.fake_pg:FakeStore"),),
)


def pretend_world(size: int) -> None:
    """From now on this process's groups are those of rank 0 of ``size``, whatever backend a script asks for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
    make, new_group = dist.init_process_group, dist.new_group

    def init_process_group(*_: Any, **__: Any) -> None:
        make("fake", rank=0, world_size=size, store=FakeStore())

    def group(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("ranks", "timeout"), args, strict=False)) | kwargs
        return new_group(given.get("ranks"), backend="fake")

    def all_gather_object(objects: list[Any], value: Any, group: Any = None) -> None:
        objects[:] = [value] * len(objects)  # what the other ranks would say, as far as it is known here

    dist.init_process_group, dist.new_group = init_process_group, group
    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = lambda *_, **__: None


@contextmanager
def groups_that_move_nothing() -> Iterator[None]:
    """Within, process groups know their ranks and nothing more, and a rank makes those it is a member of alone: a loop
    that asks groups who is in them can be run by hundreds of processes of one machine."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend

    new_group = dist.new_group

    def group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        if dist.get_rank() not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(members, backend="fake", use_local_synchronization=True)

    dist.new_group = group
    try:
        yield
    finally:
        dist.new_group = new_group
