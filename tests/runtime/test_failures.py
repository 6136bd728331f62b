"""When a rank fails or is killed, the others say where they stood and leave."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dip_megatron.core import Channel
from dip_megatron.ports import held_port
from dip_megatron.runtime.executor import Position
from dip_megatron.runtime.watch import Watchdog
from examples.llava_digits.runs import environment
from tests.forked import Forked, print_to
from tests.patience import LONG

SCRIPT = """
import os, signal, time
import torch
from dip_megatron.runtime.watch import Watchdog
import tests.runtime.dip_case as dip_case
from tests.runtime.llava_case import Case, initialize
rank, world, fault = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {fault!r}
initialize(world)
from dip_megatron.runtime.executor import Executor
from dip_megatron.megatron.forward_backward import DipForwardBackward
construct, run = DipForwardBackward.__init__, Executor._backward

def watched(self, program, executor, *rest, **options):
    store = torch.distributed.distributed_c10d._get_default_store()
    options["watchdog"] = Watchdog(store, executor.position, rank, world, interval_seconds=0.2, grace_seconds=5.0)
    construct(self, program, executor, *rest, **options)

def faulty(self, *arguments):
    if rank == world - 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the loss went up in flames")
    return run(self, *arguments)

DipForwardBackward.__init__, Executor._backward = watched, faulty
try:
    dip_case.dip_run(rank, world, Case((2, 0, 3, 1), vision=((1,) * world,), language=((1,) * world,)))
finally:
    time.sleep(5.0)  # a forked process ends at once; others take a while to close their connections
"""


@pytest.mark.parametrize("fault", ["raises", "killed"])
def test_everyone_leaves_and_says_where_it_stood(fault, tmp_path):
    world = 3
    command = [sys.executable, "-c", SCRIPT.format(fault=fault)]
    silent = partial(print_to, os.devnull)
    logs = [tmp_path / f"rank{rank}.log" for rank in range(world)]
    with held_port() as port:
        processes = [Forked(command, env, log, silent) for log, env in zip(logs, environment(world, port), strict=True)]
        deadline = time.monotonic() + LONG
        for process in processes:
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                for other in processes:
                    other.kill()
                pytest.fail("a rank hangs after another's failure")
    outputs = [log.read_text() for log in logs]
    assert [p.returncode != 0 for p in processes] == [True] * world
    if fault == "killed":
        assert processes[-1].returncode == -signal.SIGKILL
    else:
        assert "the loss went up in flames" in outputs[-1]
    for rank, text in enumerate(outputs[:-1]):
        assert f"pipeline rank {rank}" in text, text
        assert "action" in text or "ended its plan" in text, text
        # Both other ranks are neighbours of the one that is gone, the ring being of three.
        assert fault == "raises" or f"rank {world - 1}" in text, text


class _Store:
    """Of a host that answers so many calls, and is cut off then."""

    def __init__(self, answers: int):
        self.answers = answers
        self.added, self.left = 0, False
        self.cut = threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.answers -= 1
        if self.answers < 0:
            self.cut.wait()
        return self.left and keys == ["dip/1/left"]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.cut.wait()
        return desired.encode()

    def add(self, key: str, amount: int) -> int:
        if key != "dip/1/alive/5":
            return 1
        self.added += amount
        return self.added


@pytest.mark.parametrize("failed_here", [False, True])
def test_a_rank_leaves_when_the_host_of_the_store_is_cut_off(failed_here, capsys):
    left: queue.Queue[int] = queue.Queue()
    store = _Store(answers=3)
    patience = 1e6 if failed_here else 0.2
    watchdog = Watchdog(
        store, Position(2), 5, 8, patience_seconds=patience, interval_seconds=0.05, grace_seconds=0.2, leave=left.put
    )
    if failed_here:
        watchdog.report(RuntimeError("no word from pipeline rank 1"))
    assert left.get(timeout=LONG) == 1
    store.cut.set()
    watchdog.close()
    said = capsys.readouterr().err
    if failed_here:
        assert "[dip] stopped at global rank 5: pipeline rank 2" in said
        assert "could not tell the other ranks: the store's host does not answer" in said
    else:
        assert "global rank 5 stops where it stood: pipeline rank 2" in said
        assert "no word from the rank that hosts the store" in said


def test_a_store_that_answers_ends_nobody():
    left: queue.Queue[int] = queue.Queue()
    store = _Store(answers=10**6)
    watchdog = Watchdog(store, Position(0), 0, 1, patience_seconds=60.0, interval_seconds=0.01, leave=left.put)
    while store.answers > 10**6 - 50:
        time.sleep(0.01)
    watchdog.close()
    assert left.empty()


class _Cut:
    """A store that doesn't answer one rank any more once that is cut off."""

    def __init__(self, store: dist.Store):
        self.cut, self.mended = threading.Event(), threading.Event()
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if self.cut.is_set():
            self.mended.wait()
        return getattr(self._store, name)


@pytest.mark.parametrize("case", ["stopped", "in order", "never began"])
def test_a_rank_that_shows_no_sign_of_life_ends_all_others(case, capsys):
    """Though they may wait for it in collectives that aren't ours; unless a rank has ended in order."""
    store, left = dist.HashStore(), queue.Queue[int]()
    seen = _Cut(store)
    watchdogs = [
        Watchdog(
            seen if rank == 2 else store, Position(rank), rank, 4, patience_seconds=0.4, interval_seconds=0.02,
            grace_seconds=0.1, leave=left.put,
        )
        for rank in range(4)
    ]  # fmt: skip
    for watchdog in watchdogs[: 2 if case == "never began" else 4]:
        watchdog.begin()
    if case != "never began":
        while watchdogs[1]._signs < 3:
            time.sleep(0.01)
    if case == "in order":
        watchdogs[0].close()
        while not watchdogs[1]._left:
            time.sleep(0.01)
    seen.cut.set()
    if case == "stopped":
        assert [left.get(timeout=LONG) for _ in range(4)] == [1] * 4
    else:
        time.sleep(1.0)
        watchdogs[1].close()
        watchdogs[3].close()
        assert left.qsize() <= 1  # rank 2, which hears nothing of the store
    seen.mended.set()
    for watchdog in watchdogs:
        watchdog.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "global rank 2 stops" not in line]
    if case == "stopped":
        assert all(f"global rank {rank} stops where it stood: pipeline rank {rank}" in "".join(said) for rank in (0, 1))
        assert all("no word from global rank 2 for 0 s: it is stopped, or its host" in line for line in said), said
    else:
        assert not said


def test_the_first_sign_of_life_comes_at_once():
    """However patient others are: a rank that hasn't shown any is taken for one that hasn't begun."""
    store = dist.HashStore()
    watchdog = Watchdog(store, Position(0), 0, 2, patience_seconds=1e6, interval_seconds=0.02, leave=lambda _: None)
    watchdog.begin()
    deadline = time.monotonic() + LONG
    while not store.add("dip/1/alive/0", 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watchdog.close()


def test_watches_of_one_process_are_told_apart():
    """As of a job that trains two models, one after the other: the second's ranks haven't left with the first."""
    store = dist.HashStore()
    for number in (1, 2):
        watchdogs = [Watchdog(store, Position(r), r, 2, interval_seconds=0.01, leave=lambda _: None) for r in range(2)]
        while store.add(f"dip/{number}/watching", 0) < 2 or not all(watchdog._answers for watchdog in watchdogs):
            time.sleep(0.01)
        assert not any(watchdog._left for watchdog in watchdogs)
        for watchdog in watchdogs:
            watchdog.close()
        assert store.add(f"dip/{number}/left", 0) == 2


def test_whom_a_rank_waits_for_is_named_among_all_pipelines():
    position = Position(1, plan=SimpleNamespace(actions=[(), ("wait",)]), iteration=3)  # type: ignore[arg-type]
    position.waiting_for = SimpleNamespace(channel=Channel(0, 1, False))  # type: ignore[assignment]
    assert str(position) == "pipeline rank 1, iteration 3, action 1 of 1: wait, waiting for pipeline rank 0"
    position.global_ranks = (4, 6)
    assert str(position).endswith("waiting for pipeline rank 0 (global rank 4)")


def test_the_first_rank_fails_when_all_others_have_heard_of_it():
    """Who often is the host of the store: else they would hear no more than that it has gone."""
    store, left = dist.HashStore(), queue.Queue[int]()
    others = [Watchdog(store, Position(r), r, 3, interval_seconds=0.05, leave=left.put) for r in (1, 2)]
    while not all(other._answers for other in others):
        time.sleep(0.01)
    host = Watchdog(store, Position(0), 0, 3, interval_seconds=60.0, grace_seconds=LONG, leave=left.put)
    host.report(RuntimeError("out of memory"))
    assert all("RuntimeError: out of memory" in str(other._cause) for other in others)
    for watchdog in (host, *others):
        watchdog.close()


def test_an_error_that_nobody_has_caught_is_told_in_one_line(monkeypatch, capsys):
    """One that ended this rank outside of any plan, before it has trained."""
    store = dist.HashStore()
    watchdog = Watchdog(store, Position(1), 3, 4, interval_seconds=60.0, leave=lambda _: None)
    monkeypatch.setattr(sys, "last_value", RuntimeError("connection closed by peer\nmore"), raising=False)
    watchdog.close()
    said = "global rank 3: pipeline rank 1 is not training yet: RuntimeError: connection closed by peer"
    assert capsys.readouterr().err == f"[dip] stopped at {said}\n"
    assert store.get("dip/failure").decode() == said


def test_a_rank_that_fails_because_of_another_names_the_first(capsys):
    store = dist.HashStore()
    for rank, cause in ((3, "out of memory"), (1, "the peer has gone")):
        watchdog = Watchdog(store, Position(rank), rank, 4, interval_seconds=60.0, leave=lambda _: None)
        watchdog.report(RuntimeError(cause))
        watchdog.close()
    first, second = capsys.readouterr().err.split("stopped at global rank 1")
    assert "the first to stop was" not in first
    assert "global rank 1: the first to stop was global rank 3: pipeline rank 3" in second
    assert "out of memory" in second


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_a_store_may_go_with_a_host_that_has_ended_in_order(in_order, runs, monkeypatch):
    """Others still have uploads to end then; but none runs a plan."""
    store, gone, left = dist.HashStore(), threading.Event(), queue.Queue[int]()

    class Going:
        def check(self, keys: list[str]) -> bool:
            if gone.is_set():
                raise dist.DistNetworkError("the connection was closed")
            return store.check(keys)

        add, compare_set = store.add, store.compare_set

    position = Position(1)
    times = {"interval_seconds": 0.05, "grace_seconds": 0.1}
    host = Watchdog(store, Position(0), 0, 2, **times, leave=left.put)  # type: ignore[arg-type]
    other = Watchdog(Going(), position, 1, 2, **times, patience_seconds=1e6, leave=left.put)  # type: ignore[arg-type]
    while store.add("dip/1/watching", 0) < 2:
        time.sleep(0.01)
    uncaught = None if in_order else MemoryError("in the optimizer")
    monkeypatch.setattr(sys, "last_value", uncaught, raising=False)
    host.close()
    while in_order and not other._left:  # a busy machine may let it hear of that late
        time.sleep(0.01)
    if runs:
        position.plan = SimpleNamespace(actions=[(), ()])  # type: ignore[assignment]
    gone.set()
    if in_order and not runs:
        time.sleep(1.0)
        assert left.empty()
    else:
        assert left.get(timeout=LONG) == 1
    assert in_order or b"is not training yet: MemoryError: in the optimizer" in store.get("dip/failure")
    other.close()
