"""Parameter gathers start in an order that doesn't depend on the plan, and none is left under way."""

from __future__ import annotations

from typing import Any

import torch

from dip_megatron.compat.buckets import start_gradient_reduction
from dip_megatron.megatron.parameters import ParameterSynchronization


class Bucket:
    """What Megatron's bucket groups have of a parameter gather."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log
        self.param_gather_dispatched = False
        self.param_gather_handle: Any = None
        self.next_param_gather_bucket_group: Any = self

    def start_param_sync(self) -> None:
        assert self.param_gather_handle is None
        self.log.append(f"start {self.name}")
        self.param_gather_dispatched, self.param_gather_handle = True, self

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        if not self.param_gather_dispatched:
            self.start_param_sync()
        if self.param_gather_handle is not None:
            self.param_gather_handle = None
            self.log.append(f"end {self.name}")
            if self.next_param_gather_bucket_group is not None and not skip_next_bucket_dispatch:
                self.next_param_gather_bucket_group.start_param_sync()


class Chunk(torch.nn.Module):
    def __init__(self, log: list[str], *names: str, hooked: bool = True):
        super().__init__()
        self.bucket_groups = [Bucket(name, log) for name in names]
        self.expert_parallel_bucket_groups: list[Bucket] = []
        self.remove_forward_pre_hook_handles = {"module": "handle"} if hooked else {}


def test_all_gathers_start_at_the_beginning_whatever_is_used_first() -> None:
    log: list[str] = []
    vision, language, unused = Chunk(log, "v1", "v0"), Chunk(log, "l"), Chunk(log, "u")
    parameters = ParameterSynchronization([vision, language, unused])
    parameters.begin()
    for bucket in (language.bucket_groups[0], *vision.bucket_groups):  # as hooks of layers do, the last chunk first
        bucket.finish_param_sync()
    parameters.end()
    assert log == ["start v0", "start v1", "start l", "start u", "end l", "end v1", "end v0", "end u"]


def test_nothing_starts_while_megatron_has_its_hooks_removed() -> None:
    log: list[str] = []
    parameters = ParameterSynchronization([Chunk(log, "a", hooked=False), torch.nn.Linear(1, 1)])
    parameters.begin()
    parameters.end()
    assert log == []


def test_gradients_are_reduced_where_no_gathered_parameters_are() -> None:
    """Of a chunk without a stage nothing has waited for its gathers, which may be into the gradients' memory."""
    log: list[str] = []

    class Reducing(Bucket):
        def start_grad_sync(self, force_all_reduce: bool = False) -> None:
            log.append(f"reduce {self.name}")

    idle, used = Chunk(log), Chunk(log)
    idle.bucket_groups, used.bucket_groups = [Reducing("i", log)], [Reducing("u", log)]
    parameters = ParameterSynchronization([idle, used])
    parameters.begin()
    used.bucket_groups[0].finish_param_sync(skip_next_bucket_dispatch=True)
    for chunk in (used, idle):
        start_gradient_reduction(chunk)
    parameters.end()
    assert log == ["start i", "start u", "end u", "reduce u", "end i", "reduce i"]
