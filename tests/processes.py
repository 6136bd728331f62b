"""Run functions on several gloo processes and bring back what each returns or raises.

Processes of a :class:`Team` stay up between calls, because importing Megatron takes longer than most tests.
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from dip_megatron.ports import held_port
from tests.forked import context
from tests.patience import APART, LONG


class ProcessFailure(AssertionError):
    """At least one process failed; the message has every traceback."""


def _live(connection: Any, rank: int, world: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = io.BytesIO()
            # As bytes: tensors sent as objects would be shared memory of a process that may have ended by then.
            torch.save(function(rank, world, *arguments), answer)
            connection.send((True, answer.getvalue()))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            # A peer may be waiting for this process inside a collective; leaving at once breaks its connection.
            os._exit(1)


FRESH_AFTER = 100
"""Calls: process groups that runs leave behind have threads, of which a process may have so many."""


class Team:
    """``world`` processes, started at the first call, and again after a failure or many calls."""

    def __init__(self, world: int):
        self.world = world
        self.processes: list[Any] = []
        self._connections: list[Any] = []
        self._held = ExitStack()
        self._runs = 0

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = LONG) -> list[Any]:
        """``[function(rank, world, *arguments)]`` of all ranks. Raises ProcessFailure with all tracebacks."""
        if self._runs == FRESH_AFTER:
            self.close()
        if not self.processes:
            self._start()
        self._runs += 1
        for connection in self._connections:
            connection.send((function, arguments))
        answers, failures = [], []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(timeout):
                    raise EOFError(f"no answer within {timeout:.0f} s")
                good, value = connection.recv()
            except EOFError as error:
                good, value = False, f"process ended without an answer {error}"
            if good:
                answers.append(torch.load(io.BytesIO(value), weights_only=False))
            else:
                failures.append(f"--- rank {rank}\n{value}")
                timeout = 20.0
        if failures:
            self.close()
            raise ProcessFailure("\n".join(failures))
        return answers

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for p in self.processes:
            p.join(2.0)
            if p.is_alive():
                p.kill()
        self._held.close()
        self.processes, self._connections, self._runs = [], [], 0

    def _start(self) -> None:
        processes = context()
        port = self._held.enter_context(held_port())
        for rank in range(self.world):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_live, args=(theirs, rank, self.world, port))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)


@functools.cache
def transport(world: int, rank: int) -> Any:
    """This process's transport between all ranks of a pipeline. Of each there is one: a channel of gloo's is a process
    group, whose threads wake a hundred times a second for as long as the process lives."""
    from dip_megatron.runtime.transport import DistributedTransport

    return DistributedTransport(list(range(world)), rank, torch.device("cpu"), APART)


_TEAMS: dict[int, Team] = {}


def team(world: int) -> Team:
    """The shared team of this many processes."""
    if world not in _TEAMS:
        _TEAMS[world] = Team(world)
        atexit.register(_TEAMS[world].close)
    return _TEAMS[world]
