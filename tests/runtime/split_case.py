"""Our side of a case with drawn plans: weight gradients at any later place, memory strategies of any layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from dip_megatron.core import Kind, Schedule
from dip_megatron.core.lower import make_plan
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.strategies import format_strategy, strategy_names
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.maker import payloads
from dip_megatron.planner.service import PlannerService
from dip_megatron.schedulers.greedy import greedy
from tests.patience import APART
from tests.processes import transport
from tests.runtime import gpt_case, llava_case
from tests.runtime.dip_case import DrawnGraphs
from tests.runtime.gpt_case import GptCase
from tests.runtime.llava_case import (
    Case,
    finalize_without_ddp,
    freeze_arguments,
    gradients,
    initialize,
    llava_kwargs,
)


@dataclass(frozen=True)
class Drawn:
    """How plans are drawn: the share of backwards in two, the layer strategies to draw from."""

    seed: int = 0
    split: float = 0.7
    strategies: tuple[str, ...] = ("none",)


@dataclass(frozen=True)
class DrawnMaker:
    """Plans in an order given by drawn durations; see :class:`Drawn`."""

    graphs: Any
    shapes: Any
    drawn: Drawn

    def warm_up(self):
        pass

    def best(self, request, give):
        return self.quick(request)

    def quick(self, request):
        graph = self.graphs.build(request.loads, request.forward_only, request.training)
        draw = np.random.default_rng(self.drawn.seed)
        names = tuple(
            tuple(
                (format_strategy(draw.choice(self.drawn.strategies, layers)),)
                for layers in graph.module(graph.units[int(graph.unit_of[s])].module).layers[graph.segment(s)]
            )
            for s in range(graph.virtual_microbatches)
        )
        graph = replace(graph, strategies=names)
        schedule = greedy(graph)
        orders = split_orders(schedule, graph.virtual_microbatches, self.drawn.split, draw)
        return PlanSet((make_plan(
            graph, Schedule(orders, schedule.strategy), lower_bound=0.0, name="drawn",
            payloads=payloads(graph, request.loads, self.shapes),
        ),))  # fmt: skip


def split_orders(
    schedule: Schedule, virtual_microbatches: int, share: float, draw: np.random.Generator
) -> tuple[Any, ...]:
    """Orders with a ``share`` of the backwards in two, each W after its B, at once or at any later place up to the very
    end."""
    orders = []
    for order in schedule.orders:
        line: list[float] = []
        places: list[float] = []
        for i, code in enumerate(order.tolist()):
            kind, virtual_microbatch = divmod(code, virtual_microbatches)
            if kind == Kind.BW and draw.random() < share:
                line += [
                    Kind.B * virtual_microbatches + virtual_microbatch,
                    Kind.W * virtual_microbatches + virtual_microbatch,
                ]
                places += [i, draw.uniform(i, len(order) if draw.random() < 0.5 else i + 3)]
            else:
                line.append(code)
                places.append(i)
        orders.append(np.array(line, dtype=np.int32)[np.argsort(places, kind="stable")])
    return tuple(orders)


@dataclass(frozen=True)
class Wrap:
    """How the chunks are wrapped and trained."""

    ddp: bool = False
    overlap: bool = False
    fused: bool = False
    dropout: float = 0.0


def split_run(rank: int, world: int, case: Case | GptCase, drawn: Drawn, wrap: Wrap | None = None) -> Any:
    """Losses of one iteration, gradients on this rank, and how many W its plan had."""
    wrap = wrap or Wrap()
    initialize(world)
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers

    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor

    if wrap.fused:
        layers._grad_accum_fusion_available, layers.fused_weight_gradient_mlp_cuda = True, FusedOnHost
    program = _gpt(rank, world, case, wrap) if isinstance(case, GptCase) else _llava(rank, world, case, wrap)
    of = gpt_case if isinstance(case, GptCase) else llava_case
    chunks = program.build_chunks()
    of.seed_chunks(chunks)
    if wrap.ddp:
        chunks = with_ddp(chunks, wrap.overlap)
    if wrap.ddp and isinstance(case, GptCase):
        gpt_case.finalize(chunks)
    else:
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_without_ddp
    data = of.batches(case)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)
    ranks = list(range(world))
    device = torch.device("cpu")
    clock = Clock(device)
    maker = DrawnMaker(DrawnGraphs(program.modules, getattr(case, "unit_size", 1), drawn.seed), program.shapes, drawn)
    delivery = PlanDelivery(GlooExchange(ranks, APART), PlannerService(maker, workers=0) if rank == 0 else None)
    seen: list[Kind] = []
    step = DipForwardBackward(
        program, Executor(rank, transport(world, rank), clock), delivery, clock,
        on_iteration=lambda report, plan, spans: seen.extend(s.operation.kind for s in spans),
    )  # fmt: skip
    losses = step(ScheduleCall(
        forward_step_func=of.forward_step, data_iterator=iter(data), model=chunks,
        num_microbatches=len(data), forward_only=False,
    ))  # fmt: skip
    delivery.close()
    if wrap.fused:
        layers._grad_accum_fusion_available = False
    return [losses], gradients(chunks), seen.count(Kind.W)


def _llava(rank: int, world: int, case: Case, wrap: Wrap) -> Any:
    from dip_megatron.families.llava.program import LlavaProgram

    kwargs = llava_kwargs(case, world)
    for name in ("language_transformer_config", "vision_transformer_config", "vision_projection_config"):
        _adapt(kwargs[name], wrap)
    return LlavaProgram(
        kwargs, {"vision": case.vision, "language": case.language}, rank=rank,
        micro_batch_size=case.micro_batch_size, freeze=freeze_arguments(case),
    )  # fmt: skip


def _gpt(rank: int, world: int, case: GptCase, wrap: Wrap) -> Any:
    from dip_megatron.families.gpt.program import GptProgram

    kwargs = gpt_case.gpt_kwargs(case, world)
    _adapt(kwargs["config"], wrap)
    return GptProgram(kwargs, {"language": case.layers}, rank=rank, micro_batch_size=case.micro_batch_size)


def _adapt(config: Any, wrap: Wrap) -> None:
    config.hidden_dropout = config.attention_dropout = wrap.dropout
    config.gradient_accumulation_fusion = wrap.fused


class FusedOnHost:
    """What apex's kernels compute."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
        main_grad.add_(grad_output.t().matmul(total_input))


def with_ddp(chunks: list[torch.nn.Module], overlap: bool) -> list[torch.nn.Module]:
    """Chunks as Megatron's training wraps them, over one data-parallel rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    if overlap:
        wrapped[0].config.no_sync_func = [c.no_sync for c in wrapped]
    return wrapped


STRATEGIES = strategy_names()


def reductions(rank: int, world: int, case: GptCase, drawn: Drawn) -> list[tuple[str, int]]:
    """What happened on this rank, in order: ``("gradient", segment)`` for each weight gradient, ``("reduce", segment)``
    where a chunk's gradient reduction starts."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from dip_megatron.megatron.gradients import GradientSynchronization
    from dip_megatron.runtime.chunk_runner import ChunkRunner

    events: list[tuple[str, int]] = []
    owner: dict[int, int] = {}
    begin, start = GradientSynchronization.begin, _ParamAndGradBucketGroup.start_grad_sync
    progress = ChunkRunner._chunk_progress

    def begun(self: Any, *arguments: Any) -> None:
        for index, chunk in enumerate(self._chunks):
            owner.update((id(p), index) for p in chunk.parameters())
        begin(self, *arguments)

    def started(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.grad_reduce_handle is None:  # Megatron asks again at the end of the first batch, to no effect
            events.append(("reduce", owner[id(next(iter(self.params)))]))
        return start(self, *arguments, **options)

    def progressed(self: Any, key: Any) -> None:
        events.append(("gradient", key.segment))
        progress(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSynchronization, "begin", begun)
        patch.setattr(_ParamAndGradBucketGroup, "start_grad_sync", started)
        patch.setattr(ChunkRunner, "_chunk_progress", progressed)
        split_run(rank, world, case, drawn, Wrap(ddp=True, overlap=True))
    return events
