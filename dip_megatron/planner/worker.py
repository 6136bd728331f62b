"""A planner worker's process: ``python -m dip_megatron.planner.worker FD [last]`` with one end of a socket pair."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from ..core.plan_set import PlanSet
from .request import READY, PlanMaker, PlanRequest
from .warm import warm_up_plans

Answer = tuple[int, PlanSet | None, bool, str | None, float]
"""(request, plans, whether they are the final ones, error, seconds of a core it took so far)"""


def serve(connection: Connection, last: bool = False) -> None:
    """Answer requests until the other end closes: first the maker, then one request at a time.

    Until its first plan a request has the priority of the trainer's own threads, so that this is there soon even on a
    busy host; the search that follows has the lowest. ``last``: all of it has.
    """
    maker: PlanMaker = pickle.loads(connection.recv_bytes())
    warm_up_plans()
    maker.warm_up()  # while the trainer still starts up
    if last:
        _come_last()
    with contextlib.suppress(EOFError, OSError):  # the trainer has ended
        connection.send_bytes(READY)
        while True:
            request: PlanRequest = pickle.loads(connection.recv_bytes())
            # Linux lowers the priority of a thread for good, so each request has one of its own.
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(_answer, connection, maker, request).result()
            connection.send_bytes(pickle.dumps(answer))


def _answer(connection: Connection, maker: PlanMaker, request: PlanRequest) -> Answer:
    began = time.process_time()

    def give(plans: PlanSet) -> None:
        connection.send_bytes(pickle.dumps((request.request, plans, False, None, time.process_time() - began)))
        _come_last()

    try:
        plans = maker.best(request, give)
        return request.request, plans, True, None, time.process_time() - began
    except OSError:
        raise
    except Exception as error:  # told to the trainer, which plans by itself
        return request.request, None, True, f"{type(error).__name__}: {error}", time.process_time() - began


def leave_with(connection: Connection) -> None:
    """End this process as soon as the other end has closed, whatever it is doing then: a trainer that was killed ends
    nothing, and its worker may be loading, or search for long. Returns at once."""
    poll = select.poll()
    poll.register(connection.fileno(), _HANGS_UP)

    def watch() -> None:
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="dip-trainer", daemon=True).start()


_HANGS_UP = getattr(select, "POLLRDHUP", 0)  # beside POLLHUP, which is always told


def _come_last() -> None:
    """The calling thread, and those it starts from now on, wait for whoever else wants a core; where threads have no
    priority of their own, the process does."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    else:
        os.nice(19)


if __name__ == "__main__":
    trainer = Connection(int(sys.argv[1]))
    leave_with(trainer)
    serve(trainer, "last" in sys.argv[2:])
