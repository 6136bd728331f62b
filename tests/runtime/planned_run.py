"""One iteration of any program's chunks under plans, on the ranks of Megatron's groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dip_megatron.core.protocols import Exchange
from tests.collectives import Log, recorded
from tests.patience import APART


def planned_run(
    program: Any, chunks: list[torch.nn.Module], forward_step: Callable[..., Any], batches: Sequence[Any],
    group: list[int], make: Callable[[Exchange], Any], coupled: Any = None, forward_only: bool = False,
    begin_exchanges: Callable[[Any, Any], Any] = lambda delivery, coupled: None,
) -> tuple[list[Any], list[Any], Log]:  # fmt: skip
    """Losses of the last stage, the kinds of operations and the strategies that ran (and the exchange's report, if
    there was one), and the collectives. Plans are delivered to the ranks of ``group``; ``make(exchange)`` gives what
    makes them, ``begin_exchanges(delivery, coupled)`` an exchange of microbatches between replicas."""
    from megatron.core import parallel_state

    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.coupling import coupled_exchanges
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.planner.delivery import PlanDelivery
    from dip_megatron.planner.service import PlannerService
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.transport import DistributedTransport

    of = torch.distributed.get_process_group_ranks
    stage = parallel_state.get_pipeline_model_parallel_rank()
    pipeline = of(parallel_state.get_pipeline_model_parallel_group())
    tensor = of(parallel_state.get_tensor_model_parallel_group())
    clock = Clock(torch.device("cpu"))
    exchange = GlooExchange(group, 240.0)  # kernels may have to be compiled first
    maker = make(exchange)
    service = PlannerService(maker, workers=0) if exchange.rank == 0 else None
    together = None
    if coupled is not None:
        exchange, together = coupled_exchanges(group, coupled, 240.0)
    delivery = PlanDelivery(exchange, service, coupled=together)
    seen: list[Any] = []

    def consume(report: Any, plan: Any, spans: Any) -> None:
        seen.extend(s.operation.kind for s in spans)
        seen.extend(text for line in plan.graph.strategies for names in line for text in names)
        seen.extend([report.exchange] if report.exchange is not None else [])

    step = DipForwardBackward(
        program, Executor(stage, DistributedTransport(pipeline, stage, torch.device("cpu"), APART), clock), delivery,
        clock, on_iteration=consume, tensor_parallel=GlooExchange(tensor, APART) if len(tensor) > 1 else None,
        exchanges=begin_exchanges(delivery, together),
    )  # fmt: skip
    with recorded() as collectives:
        losses = step(ScheduleCall(
            forward_step_func=forward_step, data_iterator=iter(batches), model=chunks,
            num_microbatches=len(batches), forward_only=forward_only,
        ))  # fmt: skip
    delivery.close()
    return losses, seen, collectives
