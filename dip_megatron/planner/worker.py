"""A planner worker's process: ``python -m dip_megatron.planner.worker FD`` with one end of a socket pair."""

from __future__ import annotations

import os
import pickle
import sys
import time
from multiprocessing.connection import Connection

from .request import READY, AnyPlan, PlanMaker, PlanRequest
from .warm import warm_up_plans

Answer = tuple[int, AnyPlan | None, bool, str | None, float]
"""(request, plan, whether it is the final one, error, seconds of a core it took so far)"""


def serve(connection: Connection) -> None:
    """Answer requests until the other end closes: first the maker, then one request at a time."""
    maker: PlanMaker = pickle.loads(connection.recv_bytes())
    warm_up_plans()
    maker.warm_up()  # while the trainer still starts up; from then on its own threads come first
    os.nice(19)
    connection.send_bytes(READY)
    while True:
        try:
            request: PlanRequest = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(_answer(connection, maker, request)))
        except (EOFError, OSError):
            return


def _answer(connection: Connection, maker: PlanMaker, request: PlanRequest) -> Answer:
    began = time.process_time()

    def give(plan: AnyPlan) -> None:
        connection.send_bytes(pickle.dumps((request.request, plan, False, None, time.process_time() - began)))

    try:
        plan = maker.best(request, give)
        return request.request, plan, True, None, time.process_time() - began
    except OSError:
        raise
    except Exception as error:  # told to the trainer, which plans by itself
        return request.request, None, True, f"{type(error).__name__}: {error}", time.process_time() - began


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
