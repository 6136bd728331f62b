"""One plan for all ranks of a replica, or none."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.delivery import PlanDelivery, PlanMismatchError
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from tests.patience import LONG
from tests.planner.makers import Maker


class Shared:
    """Collectives among threads; ``corrupt`` changes what a rank receives."""

    def __init__(self, ranks: int, corrupt=None):
        self.slots: list[bytes] = [b""] * ranks
        self.barrier = threading.Barrier(ranks, timeout=LONG)
        self.corrupt = corrupt or (lambda rank, data: data)


class ThreadExchange:
    def __init__(self, shared: Shared, rank: int):
        self.rank, self._shared = rank, shared

    def gather(self, data: bytes) -> list[bytes]:
        self._shared.slots[self.rank] = data
        self._shared.barrier.wait()
        answer = list(self._shared.slots)
        self._shared.barrier.wait()
        return answer

    def broadcast(self, data: bytes | None) -> bytes:
        return self._shared.corrupt(self.rank, self.gather(data or b"")[0])

    def scatter(self, parts: Sequence[bytes] | None) -> bytes:
        return pickle.loads(self.gather(pickle.dumps(parts))[0])[self.rank]


def with_other_codes(data: bytes) -> bytes:
    """An answer whose plan has been corrupted on its way."""
    answer = pickle.loads(data)
    codes = answer.plan.codes
    return pickle.dumps(replace(answer, plan=replace(answer.plan, codes=(codes[0][::-1], *codes[1:]))))


def deliver_all(shared: Shared, ranks: int, maker: Maker):
    def one(rank: int):
        service = PlannerService(maker, 0) if rank == 0 else None
        delivery = PlanDelivery(ThreadExchange(shared, rank), service)
        delivery.request(PlanRequest(7, ((Microbatch(8),),), 0.0), 0.0)
        try:
            return delivery.take(7).plan.digest()
        except Exception as error:
            return error
        finally:
            delivery.close()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def test_all_ranks_get_the_same_plan():
    digests = deliver_all(Shared(3), 3, Maker())
    assert len(set(digests)) == 1
    assert len(digests[0]) == 64


def test_a_corrupted_plan_stops_all_ranks_with_one_message():
    def corrupt(rank: int, data: bytes) -> bytes:
        return with_other_codes(data) if rank == 1 else data

    answers = deliver_all(Shared(3, corrupt), 3, Maker())
    assert all(isinstance(a, PlanMismatchError) for a in answers)
    assert {str(a) for a in answers} == {str(answers[0])}
    assert "ranks [1]" in str(answers[0])


class Hopeless(Maker):
    def quick(self, request):
        raise ValueError("rank 0 lacks 12 bytes")


def test_what_cannot_be_planned_is_told_to_all_ranks():
    for answer in deliver_all(Shared(2), 2, Hopeless()):
        assert isinstance(answer, RuntimeError)
        assert "rank 0 lacks 12 bytes" in str(answer)


def test_only_rank_0_plans():
    with pytest.raises(ValueError, match="exactly rank 0"):
        PlanDelivery(ThreadExchange(Shared(2), 1), PlannerService(Maker(), 0))


def test_an_evaluation_does_not_wait_for_ever_behind_a_plan_that_training_does_not_need_yet():
    """Its worker hangs, and one thread delivers both."""
    service = PlannerService(Maker("hangs"), 1)
    while not service.ready():
        time.sleep(0.1)
    delivery = PlanDelivery(ThreadExchange(Shared(1), 0), service)
    delivery.request(PlanRequest(1, ((Microbatch(8),),), 0.1), 0.1, ahead=True)
    delivery.request(PlanRequest(2, ((Microbatch(8),),), 0.0, forward_only=True), 0.0)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(delivery.take, 2)
        try:
            assert taken.result(LONG).plan.name == "greedy"
        finally:
            delivery.close()
            delivery.take(1)
