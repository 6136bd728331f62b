"""One process that takes itself for the first rank of a job: torch's ``fake`` process groups, whose collectives return
at once and move nothing.

Importing ``fake_pg`` registers their backend.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from .names import Name, Topic

TOPIC = Topic(
    "process groups that move nothing",
    "torch",
    "2.13.0, 2.15.0",
    "`dip estimate` can't run a script",
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
