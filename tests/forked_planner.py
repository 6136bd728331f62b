"""Planner workers forked from the rank that plans, with all that it has loaded."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

import psutil

from dip_megatron.planner.worker import serve

NAME = "dip-planner"  # as the system lists it; the command stays that of the process it was forked from
_PR_SET_NAME = 15


class Worker:
    """A forked process with the methods of subprocess.Popen that the service asks."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                ended, status = self.pid, 0
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(NAME, timeout)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, what: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, what)


def start_process(theirs: socket.socket) -> Any:
    """In place of ``dip_megatron.planner.service.start_process``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: no lock of theirs is needed
        pid = os.fork()
    if pid:
        return Worker(pid)
    code = 1
    try:
        _alone(theirs.fileno())
        serve(Connection(theirs.detach()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _alone(connection: int) -> None:
    """Let go of what the rank holds: its peers must see its connections close when it ends."""
    os.closerange(3, connection)
    os.closerange(connection + 1, os.sysconf("SC_OPEN_MAX"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)


def workers() -> list[psutil.Process]:
    """Those below this process."""
    return [child for child in psutil.Process().children(recursive=True) if child.name() == NAME]
