"""torch's process groups and stores from the inside."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
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
        Name("torch.distributed.distributed_c10d:_world.group_count"),
        Name("torch.distributed.distributed_c10d:_hash_ranks_to_str", ("ranks",)),
        Name("torch.distributed.distributed_c10d:_get_default_store", ()),
        Name("torch.distributed.distributed_c10d:_get_default_group", ()),
        Name("torch.distributed:ProcessGroup.bound_device_id"),
        Name(
            "torch.distributed:new_group",
            ("ranks", "*", "timeout", "backend", "use_local_synchronization", "pg_options", "device_id"),
        ),
        Name("torch.distributed.distributed_c10d:ProcessGroupGloo.create_default_device"),
        Name("torch.distributed.distributed_c10d:ProcessGroupGloo.create_device"),
        Name("torch.distributed.distributed_c10d:ProcessGroupGloo._Options", has=("_devices", "_threads", "_timeout")),
    ),
)  # fmt: skip

_ADAPTED = "_dip_adapts_groups"


def groups_of(members: Sequence[int]) -> int:
    """How many groups of exactly these global ranks this process knows."""
    known = distributed_c10d._world.pg_group_ranks.values()
    return sum(sorted(ranks) == list(members) for ranks in known)


@contextmanager
def group_named(name: str) -> Iterator[None]:
    """Within, a group made with ``use_local_synchronization`` is found by its members under ``name``.

    It doesn't count as one that all ranks make: by their number these are found, and torch counts both from 2.15 on.
    """
    torchs, world = distributed_c10d._hash_ranks_to_str, distributed_c10d._world
    distributed_c10d._hash_ranks_to_str, count = lambda _: name, world.group_count
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str, world.group_count = torchs, count


@contextmanager
def of_its_own() -> Iterator[None]:
    """Within, a new group gets communicators of its own.

    Where the job's group is bound to a device, as torch binds it from 2.15 on, NCCL's communicators of other groups are
    split off its own, and that takes all ranks of the job: members that make a group without them would wait for ever.
    """
    everyone: Any = distributed_c10d._get_default_group()
    bound = everyone.bound_device_id
    if bound is None:
        yield
        return
    everyone.bound_device_id = None
    try:
        yield
    finally:
        everyone.bound_device_id = bound


def nccl_options(blocks: int, timeout: timedelta) -> Any:
    """What NCCL is asked for in a group of few messages that may wait for long: at most ``blocks`` blocks of threads
    for each, which occupy the device while they wait, and a stream that is none of the usual ones, of which a process
    has 32 that all its groups and copies take in turn: what shared one with a message that waits would wait with it."""
    options: Any = distributed_c10d.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = blocks
    options._timeout = timeout
    return options


def adapt_gloo_groups() -> None:
    """Let all gloo groups that this process makes from here on share one device, and work in one thread each.

    Otherwise each has a device of its own, with a thread that wakes a hundred times a second whether there is something
    to do or not. Megatron makes dozens of groups: where ranks compute on the CPU, some thousand interruptions a second.

    And each has two threads that run its collectives. Where both end one at the same time they write its name to one
    string, without a lock (``lastCompletedWorkName`` in torch's ``ProcessGroupGloo::runLoop``); the name of a coalesced
    all-gather lies on the heap, where the string's old bytes are freed twice or written to after they were freed.
    Megatron's parameter gathers are such, several at a time: runs died of it after a hundred iterations.
    """
    theirs: Any = distributed_c10d.ProcessGroupGloo
    if getattr(theirs, _ADAPTED, False):
        return

    class Known(type(theirs)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, theirs)  # groups made before count as well

    class AdaptedGloo(theirs, metaclass=Known):
        def __init__(self, store: Any, rank: int, size: int, *arguments: Any, **more: Any) -> None:
            if arguments or not more.keys() <= {"timeout", "enable_reconfigure"}:
                super().__init__(store, rank, size, *arguments, **more)
                return
            options = theirs._Options()
            options._devices, options._threads = _devices(os.getpid()), 1
            if "timeout" in more:
                options._timeout = more["timeout"]
            if more.get("enable_reconfigure"):
                options.enable_reconfigure = True
            super().__init__(store, rank, size, options)

    @functools.cache
    def _devices(_: int) -> list[Any]:
        """As torch makes them for each group."""
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if interfaces:
            return [theirs.create_device(interface=name) for name in interfaces.split(",")]
        return [theirs.create_default_device()]

    setattr(AdaptedGloo, _ADAPTED, True)
    distributed_c10d.ProcessGroupGloo = AdaptedGloo


def shared_store() -> Any:
    """The rendezvous store of the default process group, which all ranks reach."""
    return dist.distributed_c10d._get_default_store()
