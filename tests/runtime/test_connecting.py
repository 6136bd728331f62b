"""Where a channel's first message makes the connection, and hosts wait for each other there, as NCCL has it."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dip_megatron.core import Channel, TensorSpec
from dip_megatron.core.lower import incoming
from dip_megatron.runtime import groups, transport
from dip_megatron.runtime.clock import Clock
from dip_megatron.runtime.executor import Executor
from dip_megatron.runtime.transport import DistributedTransport, blocks_of_messages, ring_channels
from tests.patience import LONG
from tests.processes import team
from tests.runtime.delayed_case import PlainOrder, WholeNumbers, place, plan_of

BRIEF = 0.5
"""Seconds after which a host that waits for its peer counts as stuck, where it is meant to be."""


class Waiting:
    """A transfer: what a receive waits for, nothing for a send."""

    def __init__(self, mail: queue.Queue[Any] | None):
        self._mail = mail

    def wait(self) -> Any:
        return {} if self._mail is None else self._mail.get(timeout=LONG)

    def done(self) -> bool:
        return self._mail is None


class Connecting:
    """Between threads. ``patience``: how long a host waits at a first message; ``opens``: whether these come before."""

    sees_arrivals = False

    def __init__(self, ends: Any, mails: Any, patience: float, opens: bool):
        self._ends, self._mails, self._patience, self._opens = ends, mails, patience, opens
        self._known: set[Channel] = set()

    def open(self, channels: Any) -> None:
        for channel in sorted(channels) if self._opens else ():
            self._meet(channel)

    def send(self, channel: Channel, tensors: Any) -> Waiting:
        self._meet(channel)
        self._mails[channel].put(tensors)
        return Waiting(None)

    def receive(self, channel: Channel, payload: Any) -> Waiting:
        self._meet(channel)
        return Waiting(self._mails[channel])

    def _meet(self, channel: Channel) -> None:
        if channel not in self._known:
            self._ends[channel].wait(self._patience)
            self._known.add(channel)


def all_end(seed: int, world: int, patience: float, opens: bool) -> bool:
    """Whether all ranks get through a plan."""
    ends: Any = defaultdict(lambda: threading.Barrier(2))
    mails: Any = defaultdict(queue.Queue)
    for channel in ring_channels(world, replicated=True):
        ends[channel], mails[channel]  # made here, not by two threads at once
    plan, ended = plan_of(seed, world), []
    stages = PlainOrder(plan.graph).stages

    def run(rank: int) -> None:
        mine = [stage for stage in stages if stage.rank == rank]
        sizes = {(*place(s), i): m.source.unit for s in mine for i, m in enumerate(incoming(plan.graph, s))}
        executor = Executor(rank, Connecting(ends, mails, patience, opens), Clock(torch.device("cpu")))
        try:
            executor.run(plan, WholeNumbers(sizes=sizes), seed)
            ended.append(rank)
        except threading.BrokenBarrierError:
            for peer in range(world):  # whoever waits for its messages
                for gradient in (False, True):
                    mails[Channel(rank, peer, gradient)].put({})

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    return len(ended) == world


@pytest.mark.parametrize("world", [2, 4])
def test_plans_end_because_channels_are_opened_before(world):
    assert all(all_end(seed, world, LONG, True) for seed in range(20))


def test_hosts_would_wait_for_each_other():
    """Else the test above, which runs the same plan, says nothing."""
    hook, threading.excepthook = threading.excepthook, lambda _: None  # what is half sent breaks stages, too
    try:
        assert not all_end(13, 2, BRIEF, False)
    finally:
        threading.excepthook = hook


def test_channels_are_opened_once_and_in_one_order(monkeypatch):
    made, sent = [], []

    def group(ranks: list[int], backend: str, *_: Any) -> str:
        made.append((sorted(ranks), backend))
        return f"group {len(made)}"

    def begin(way: str) -> Any:
        def begun(tensor: torch.Tensor, peer: int, group: str) -> SimpleNamespace:
            sent.append((way, peer, group, tensor.numel()))
            return SimpleNamespace(wait=lambda *_: None)

        return begun

    monkeypatch.setattr(transport, "local_group", group)
    monkeypatch.setattr(dist, "isend", begin("send"))
    monkeypatch.setattr(dist, "irecv", begin("receive"))
    ours = DistributedTransport([10, 11, 12], 1, torch.device("cpu"), 5.0)
    ours.open([Channel(2, 1, True), Channel(0, 1, False), Channel(1, 2, False)])
    assert made == [([10, 11], "gloo"), ([11, 12], "gloo"), ([11, 12], "gloo")]
    assert sent == [("receive", 10, "group 1", 1), ("send", 12, "group 2", 1), ("receive", 12, "group 3", 1)]
    ours.open([Channel(0, 1, False)])
    assert len(made) == 3
    ours.receive(Channel(0, 1, False), (TensorSpec("x", (7,), "float32"),))
    assert sent[3:] == [("receive", 10, "group 1", 7)]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_group_is_made_without_the_ranks_that_are_not_in_it(monkeypatch, backend):
    """Torch splits NCCL's communicators off the job's where that is bound to a device, which takes all of its ranks."""
    if backend == "nccl" and not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    job = SimpleNamespace(bound_device_id=torch.device("cuda", 3))
    given: dict[str, Any] = {}

    def new_group(ranks: list[int], **options: Any) -> str:
        given.update(options, ranks=ranks, bound=job.bound_device_id)
        raise RuntimeError("no such device")

    monkeypatch.setattr(distributed_c10d, "_get_default_group", lambda: job)
    monkeypatch.setattr(groups, "groups_of", lambda _: 0)
    monkeypatch.setattr(dist, "new_group", new_group)
    with pytest.raises(RuntimeError, match="no such device"):
        groups.local_group([5, 4], backend, timedelta(seconds=70), torch.device("cuda", 3), 6)
    assert (given["ranks"], given["bound"], given["use_local_synchronization"]) == ([4, 5], None, True)
    assert job.bound_device_id == torch.device("cuda", 3)
    if backend == "nccl":
        options = given["pg_options"]
        assert given["device_id"] == torch.device("cuda", 3)
        assert (options.is_high_priority_stream, options.config.max_ctas) == (True, 6)


def test_messages_that_wait_leave_most_of_a_device():
    for ranks in range(2, 33):
        for replicated in (False, True):
            channels = ring_channels(ranks, replicated)
            most = max(sum(r in (c.source, c.target) for c in channels) for r in range(ranks))
            assert most * blocks_of_messages(channels) <= max(64, most)
    assert blocks_of_messages(ring_channels(8)) == 8


def make_groups(rank: int, world: int) -> tuple[int, int, float]:
    """Some ranks make groups of their own, then all make one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    before = distributed_c10d._world.group_count
    for _ in range(rank):
        groups.local_group([rank], "gloo", timedelta(seconds=60))
    after = distributed_c10d._world.group_count
    sums = torch.ones(1)
    dist.all_reduce(sums, group=dist.new_group(list(range(world)), timeout=timedelta(seconds=60)))
    return before, after, float(sums)


def test_groups_that_all_ranks_make_are_found_after_those_of_some():
    answers = team(2).run(make_groups)
    assert [after - before for before, after, _ in answers] == [0, 0]
    assert [sums for *_, sums in answers] == [2.0, 2.0]
