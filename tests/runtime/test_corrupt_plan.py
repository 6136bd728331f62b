"""A plan that is not the same on all ranks runs on none: tried on real processes."""

from __future__ import annotations

import pickle
from dataclasses import replace

import torch.distributed as dist

from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.delivery import PlanDelivery, PlanMismatchError
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from tests.patience import APART
from tests.planner.makers import Maker
from tests.processes import team


def take_three(rank: int, world: int) -> list[str]:
    """What becomes of three iterations, if memory of the last rank fails during the second."""
    from dip_megatron.megatron.exchange import GlooExchange

    if not dist.is_initialized():
        dist.init_process_group("gloo")

    class Failing(GlooExchange):
        def broadcast(self, data: bytes | None) -> bytes:
            received = super().broadcast(data)
            answer = pickle.loads(received)
            if rank < world - 1 or iteration != 1:
                return received
            # One action less: no message is missing yet, but ranks would wait for each other at the end.
            codes = answer.plan.codes
            return pickle.dumps(replace(answer, plan=replace(answer.plan, codes=(codes[0][:-1], *codes[1:]))))

    delivery = PlanDelivery(Failing(list(range(world)), APART), PlannerService(Maker(), 0) if rank == 0 else None)
    outcomes = []
    for iteration in range(3):
        delivery.request(PlanRequest(iteration, ((Microbatch(8),),), 0.0), 0.0)
        try:
            outcomes.append(delivery.take(iteration).plan.digest())
        except PlanMismatchError as error:
            outcomes.append(str(error))
    delivery.close()
    return outcomes


def test_all_ranks_stop_with_one_message():
    first, second = team(2).run(take_three)
    assert first == second
    assert "ranks [1] of the replica hold another plan" in first[1]
    assert len({first[0], first[2]}) == 2
    assert all(len(digest) == 64 for digest in (first[0], first[2]))
