"""Replicas that exchange microbatches while a loop of its own trains, for processes of a team."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from dip_megatron.describe.files import resolve
from dip_megatron.megatron.hooks import Hooks
from dip_megatron.megatron.replicas import ReplicaExchange
from tests.runtime.llava_case import initialize

ITERATIONS, MICROBATCHES = 3, 3


class Job(NamedTuple):
    """``stages`` pipeline ranks a replica; ``by_tokens``: losses are weighted by tokens; ``sharded``: the optimizer is
    distributed, and reductions overlap with backwards; data are drawn from ``seed``."""

    stages: int
    by_tokens: bool
    sharded: bool
    seed: int


class Trained(NamedTuple):
    """By iteration: the loss over all replicas, the gradients' norm, lengths of the microbatches that all replicas had,
    how many this one had, and how many changed replicas; in the end, a digest of this process's random states."""

    losses: list[float]
    norms: list[float]
    lengths: list[list[int]]
    counts: list[int]
    moved: list[int]
    random: str


def drawn(job: Job, replica: int, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of one replica; odd ones read documents that are longer."""
    generator = torch.Generator().manual_seed(100 * job.seed + replica)
    while True:
        length = int(torch.randint(4, 28, (), generator=generator)) * (1 + replica % 2)
        ids = torch.randint(0, vocabulary, (1, length + 1), generator=generator)
        yield {"tokens": ids[:, :-1], "labels": ids[:, 1:]}


def trains(rank: int, world: int, job: Job, balance: str, slow: str) -> Trained:
    """Under Megatron-Core's own schedule, or, where there is a ``balance``, under plans for the cluster ``slow``."""
    initialize(job.stages)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from examples.any_loop import train

    iteration = 0
    chunks, optimizer = _built(job, balance, slow, lambda: iteration + 1 < ITERATIONS)
    lengths: list[int] = []

    def step(data: Any, model: Any) -> Any:
        tokens = next(data)
        output, loss = train.forward_step(iter([tokens]), model)
        if parallel_state.is_pipeline_last_stage():
            lengths.append(tokens["tokens"].shape[1])
        return output, _weighted if job.by_tokens else loss

    data = drawn(job, parallel_state.get_data_parallel_rank(), train.VOCABULARY)
    found = Trained([], [], [], [], [], "")
    seed_all(job.seed)
    with exchanges_counted(found.moved):
        for iteration in range(ITERATIONS):  # noqa: B007  # another_follows looks at it
            lengths.clear()
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=step, data_iterator=data, model=chunks, num_microbatches=MICROBATCHES,
                seq_length=train.LENGTH, micro_batch_size=1, forward_only=False,
            )  # fmt: skip
            found.norms.append(float(optimizer.step()[1]))
            values = gathered([report["loss"].tolist() for report in reports])
            pairs = torch.tensor([value if job.by_tokens else [value, 1.0] for value in values])
            found.losses.append(float(pairs[:, 0].sum() / pairs[:, 1].sum()))
            found.lengths.append(sorted(gathered(lengths)))
            found.counts.append(len(lengths))
    if balance:
        runs = Hooks.installed().runs
        assert runs.session is not None
        runs.end(runs.session)
    states = (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index, union-attr]  # noqa: NPY002
    return found._replace(random=hashlib.sha256(repr(states).encode()).hexdigest())


def _built(job: Job, balance: str, slow: str, another_follows: Callable[[], bool]) -> tuple[list[Any], Any]:
    """This rank's chunks, wrapped, and their optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    import dip_megatron
    from examples.any_loop import train

    if balance:
        stages = dip_megatron.build_model(
            train.provide, micro_batch_size=1, num_microbatches=MICROBATCHES, schedule="dynamic", planner_workers=0,
            modules={"language": {"layers": [[4 // job.stages] * job.stages]}}, balance=balance, cluster=slow,
            recalibrate=False, weights_by_tokens=job.by_tokens, read_ahead=True, search_budget=0.02,
            another_follows=another_follows,
        )  # fmt: skip
    else:
        stages = [train.provide(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())]
    dip_megatron.draw_by_name(stages, 1, lambda name, parameter: 0.05 if parameter.dim() > 1 else None)
    reduction = DistributedDataParallelConfig(
        overlap_grad_reduce=job.sharded, use_distributed_optimizer=job.sharded, bucket_size=20_000
    )
    for stage in stages:
        stage.config.calculate_per_token_loss = job.by_tokens
        stage.config.finalize_model_grads_func = finalize_model_grads
    chunks = [DistributedDataParallel(stage.config, reduction, stage) for stage in stages]
    if job.sharded:
        for stage in stages:
            stage.config.no_sync_func = chunks[0].no_sync
    # An epsilon as large as gradients: Adam would else make much of the last digits of small ones.
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1.0, adam_eps=1.0, weight_decay=0.0, clip_grad=1e9, use_distributed_optimizer=job.sharded),
        chunks,
    )
    return chunks, optimizer


def seed_all(seed: int) -> None:
    """The random states of this process."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # data workers use it
    torch.manual_seed(seed)


def gathered(values: list[Any]) -> list[Any]:
    """Those of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return [value for line in everyone for value in line]


@contextmanager
def exchanges_counted(moved: list[int]) -> Iterator[None]:
    """``moved`` grows by how many microbatches change replicas, exchange by exchange."""
    plain = ReplicaExchange.exchange

    def exchange(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found, report = plain(self, *arguments, **keywords)
        moved.append(report.moved)
        return found, report

    with patch.object(ReplicaExchange, "exchange", exchange):
        yield


def _weighted(losses: torch.Tensor) -> Any:
    """Losses per token added up and their number, to train on; both to report."""
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, {"loss": torch.stack([total.detach().clone(), count.float()])}


def slow_cluster() -> str:
    """Devices a thousand times as slow as the host, so that it is never too busy for an exchange to be worth it."""
    return resolve("clusters", "cpu").read_text(encoding="utf-8").replace("tflops: 0.085", "tflops: 0.000085")
