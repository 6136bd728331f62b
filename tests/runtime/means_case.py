"""The loss that balances experts over a whole iteration (``global_aux_loss``): what each router's call took for the
mean of tokens per expert, and Megatron's own schedule with given means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.runtime import experts_case

Layer = tuple[int, bool]
"""Number of a layer, and whether it is one of multi-token prediction's."""
Calls = dict[Layer, list[tuple[tuple[int, ...], list[float]]]]
"""Of each layer's calls, one after the other, this rank's tokens per expert, and the mean that the loss took."""


@contextmanager
def _around(change: Callable[[Any, Layer, torch.Tensor], None], after: Callable[..., None]) -> Iterator[None]:
    """Within, ``change`` and ``after`` are called around each loss, with router, layer and tokens per expert."""
    from megatron.core.transformer.moe.router import TopKRouter

    original = TopKRouter._apply_global_aux_loss

    def loss(self: Any, probs: Any, scores: Any, routing_map: torch.Tensor, *rest: Any, **more: Any) -> Any:
        layer, own = (self.layer_number, bool(getattr(self, "is_mtp_layer", False))), routing_map.sum(dim=0)
        change(self, layer, own)
        out = original(self, probs, scores, routing_map, *rest, **more)
        after(self, layer, own)
        return out

    TopKRouter._apply_global_aux_loss = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        TopKRouter._apply_global_aux_loss = original  # type: ignore[method-assign]


def recording(rank: int, world: int, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Calls]:
    """What a function of :mod:`.experts_case` gives, and the means that it was given with."""
    calls: Calls = defaultdict(list)

    def note(router: Any, layer: Layer, own: torch.Tensor) -> None:
        mean = router.global_tokens_per_expert / router.ga_steps
        calls[layer].append((tuple(own.long().tolist()), mean.tolist()))

    with _around(lambda *_: None, note):
        return function(rank, world, *arguments), dict(calls)


def megatrons(rank: int, world: int, ranks: Any, case: Any, replicas: Sequence[Calls]) -> Any:
    """Of Megatron's own 1F1B, each call with the mean that the same tokens had in ``replicas``."""
    from megatron.core import parallel_state

    experts_case.initialize(world, ranks)
    calls = replicas[parallel_state.get_data_parallel_rank()]
    means = {layer: dict(of_layer) for layer, of_layer in calls.items()}

    def give(router: Any, layer: Layer, own: torch.Tensor) -> None:
        total = own.float()
        torch.distributed.all_reduce(total, group=router.tp_dp_cp_group)  # which the call adds
        mean = torch.tensor(means[layer][tuple(own.long().tolist())])
        router.global_tokens_per_expert.copy_(mean - total)
        router.ga_steps.zero_()

    with _around(give, lambda *_: None):
        return experts_case.megatrons(rank, world, ranks, case)


def of_replica(calls: Sequence[Calls]) -> Calls:
    """Of the pipeline ranks of one replica."""
    return {layer: of_layer for of_rank in calls for layer, of_layer in of_rank.items()}


def check_means(replicas: Sequence[Calls], microbatches: int) -> None:
    """Each mean is that of all replicas' calls of its layer so far."""
    for layer in replicas[0]:
        meetings = list(zip(*(replica[layer] for replica in replicas), strict=True))
        assert len(meetings) == microbatches
        total = torch.zeros(len(meetings[0][0][1]))
        for k, calls in enumerate(meetings):
            total += torch.tensor([own for own, _ in calls], dtype=torch.float32).sum(dim=0)
            for _, mean in calls:
                torch.testing.assert_close(torch.tensor(mean), total / (k + 1), rtol=1e-5, atol=1e-4)
