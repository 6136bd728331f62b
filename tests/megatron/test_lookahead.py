"""Reading ahead where several ranks read together and only one of them sees the end of the data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dip_megatron.compat.token_counts import TokenCounts
from dip_megatron.megatron.lookahead import LookAhead, RawItems
from dip_megatron.megatron.step import MegatronStep
from dip_megatron.runtime.chunk_runner import LossPart
from dip_megatron.runtime.protocol import MicrobatchInputs
from tests.patience import LONG


class Ranks:
    """An exchange between threads."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=LONG)
        self.given: dict[int, bytes] = {}

    def gather(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def gather(data: bytes) -> list[bytes]:
            self.given[rank] = data
            self.barrier.wait()
            everyone = [self.given[r] for r in sorted(self.given)]
            self.barrier.wait()
            return everyone

        return gather


def read_together(items_each: int, items: int, takes: list[int]) -> list[list[object]]:
    """What two ranks get; the second has no data and would wait for a broadcast of the first for a minute."""
    ranks, broadcast = Ranks(2), threading.Barrier(2, timeout=60.0)
    results: list[list[object]] = [[], []]

    def work(rank: int) -> None:
        source = RawItems(iter(range(items))) if rank == 0 else None

        def read() -> MicrobatchInputs:
            taken = None if source is None else [next(source) for _ in range(items_each)]
            broadcast.wait()
            return MicrobatchInputs({}, taken)

        ahead = LookAhead(read, source, ranks.gather(rank))
        for count in takes:
            try:
                results[rank].append([m.items for m in ahead.take(count)])
                results[rank].append(len(ahead.peek(count)))
            except StopIteration as end:
                results[rank].append(str(end))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    return results


@pytest.mark.parametrize("items_each", [1, 2])
def test_all_ranks_stop_at_the_end_of_the_data(items_each: int) -> None:
    with_data, without = read_together(items_each, items=5 * items_each, takes=[2, 2, 2])
    batch = [list(range(i * items_each, (i + 1) * items_each)) for i in range(5)]
    ended = "the data has ended: 1 of 2 microbatches are left"
    assert with_data == [batch[:2], 2, batch[2:4], 1, ended]
    assert without == [[None, None], 2, [None, None], 1, ended]


def test_a_growing_batch_takes_what_was_read_before() -> None:
    source = RawItems(iter(range(6)))
    ahead = LookAhead(lambda: MicrobatchInputs({}, [next(source)]))
    seen = [m.items for m in ahead.take(1)] + [m.items for m in ahead.peek(1)]
    seen += [m.items for m in ahead.take(3)] + [m.items for m in ahead.take(2)]
    assert seen == [[0], [1], [1], [2], [3], [4], [5]]
    with pytest.raises(StopIteration, match="0 of 1"):
        ahead.take(1)


class Epochs:
    """An iterator that ends after each epoch of three items, and begins the next when it is asked again."""

    def __init__(self) -> None:
        self.given = 0
        self.ends = False

    def __iter__(self) -> Epochs:
        return self

    def __next__(self) -> int:
        if self.ends:
            self.ends = False
            raise StopIteration
        self.given += 1
        self.ends = self.given % 3 == 0
        return self.given


def test_an_iterator_that_begins_anew_after_its_end_is_read_on() -> None:
    items = RawItems(Epochs())
    ahead = LookAhead(lambda: MicrobatchInputs({}, [next(items)]), items)
    taken = []
    for _ in range(5):
        try:
            taken.append([m.items[0] for m in ahead.take(2) if m.items])
            ahead.peek(2)
        except StopIteration:
            taken.append([])
    assert taken == [[1, 2], [], [3, 4], [5, 6], []]


def test_tokens_count_in_the_iteration_that_trains_on_them() -> None:
    """Scripts tell Megatron's log of packed sequences wherever ``forward_step`` runs: when they are read ahead, and
    once more for their loss."""
    training = pytest.importorskip("megatron.training.training")
    if not hasattr(training, "update_seqlen_stats_from_cu_seqlens"):
        pytest.skip("before 0.19 nothing is counted")
    lengths = iter([[3, 5], [4], [2, 2]])

    def forward_step(*_: Any) -> Any:
        ends = torch.tensor([0, *accumulate(next(lengths, [100]))], dtype=torch.int32)
        training.update_seqlen_stats_from_cu_seqlens(ends)
        return torch.ones(1), lambda output: (output, {"lm loss": output})

    ahead = LookAhead(lambda: MicrobatchInputs({"read": forward_step()}))
    ahead.fill(2)
    assert training.consume_seqlen_stats_in_iteration() == (None, None)
    ahead.take(1)
    ahead.fill(2)
    config = SimpleNamespace(timers=None, enable_autocast=False, calculate_per_token_loss=False)
    step = MegatronStep(
        config, forward_step, num_microbatches=1, context_parallel_size=1, collect_non_loss_data=False
    )  # fmt: skip
    step.loss(torch.nn.Identity(), None, [], 0, LossPart())
    assert training.consume_seqlen_stats_in_iteration() == (8.0, 34.0)
    ahead.take(2)
    assert training.consume_seqlen_stats_in_iteration() == (8.0, 24.0)
    assert training.consume_seqlen_stats_in_iteration() == (None, None)


def test_each_loop_counts_in_its_own_state() -> None:
    """As Megatron-Bridge's scripts do; a process may run several of its loops, one after the other or in turns."""
    states = [SimpleNamespace(_flops_seqlen_sum=0) for _ in range(2)]

    def reading(state: Any, tokens: int) -> LookAhead:
        def read() -> MicrobatchInputs:
            state._flops_seqlen_sum += tokens
            return MicrobatchInputs({})

        return LookAhead(read, counts=TokenCounts(state))

    loops = [reading(state, tokens) for state, tokens in zip(states, (10, 100), strict=True)]
    for loop in loops:
        loop.fill(3)
    seen = [[state._flops_seqlen_sum for state in states]]
    for i, count in ((0, 1), (1, 2), (0, 2)):
        loops[i].take(count)
        seen.append([state._flops_seqlen_sum for state in states])
    assert seen == [[0, 0], [10, 0], [10, 200], [30, 200]]
