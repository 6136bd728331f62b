"""Our side of a case: the same model in segments, run from plans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dip_megatron.core import ModalityModule, OperationGraph, Unit
from dip_megatron.describe.model import Training
from dip_megatron.describe.workload import Microbatch
from dip_megatron.describe.workload.units import even_slices
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.maker import LivePlanMaker
from dip_megatron.planner.model_graphs import without_training
from dip_megatron.planner.service import PlannerService
from tests.patience import APART
from tests.processes import transport
from tests.runtime.drawn_graphs import drawn_graph
from tests.runtime.llava_case import (
    Case,
    batches,
    finalize_without_ddp,
    forward_step,
    freeze_arguments,
    gradients,
    initialize,
    llava_kwargs,
    seed_parameters,
    sparse_forward_step,
)


@dataclass(frozen=True)
class DrawnGraphs:
    """Drawn graphs of a LLaVA."""

    modules: tuple[ModalityModule, ...]
    unit_size: int
    seed: int = 0

    def build(
        self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None
    ) -> OperationGraph:
        units: list[Unit] = []
        for m, load in enumerate(loads):
            slices = even_slices(len(load.images), self.unit_size)
            language = len(units) + len(slices)
            for first, count in slices:
                units.append(Unit(len(units), "vision", m, first, count, (language,)))
            units.append(Unit(language, "language", m, 0, len(load.sequences)))
        graph = drawn_graph(self.modules, units, self.seed)
        return without_training(graph) if forward_only else followed(graph, training)


def followed(graph: OperationGraph, training: Training | None) -> OperationGraph:
    """The graph of the model as built."""
    return graph if training is None else training.on(graph)


def dip_run(rank: int, world: int, case: Case, seed: int = 0, iterations: int = 1) -> Any:
    """Losses per iteration and gradients after the last, on this rank."""
    initialize(world)
    return run_initialized(rank, world, case, seed, iterations)


def run_initialized(rank: int, world: int, case: Case, seed: int = 0, iterations: int = 1) -> Any:
    from dip_megatron.families.llava.program import LlavaProgram
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor

    program = LlavaProgram(
        llava_kwargs(case, world), {"vision": case.vision, "language": case.language}, rank=rank,
        micro_batch_size=case.micro_batch_size, freeze=freeze_arguments(case),
    )  # fmt: skip
    chunks = program.build_chunks()
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    seed_parameters(chunks)
    ranks = list(range(world))
    device = torch.device("cpu")
    clock = Clock(device)
    maker = LivePlanMaker(DrawnGraphs(program.modules, case.unit_size, seed), program.shapes)
    delivery = PlanDelivery(GlooExchange(ranks, APART), PlannerService(maker, workers=0) if rank == 0 else None)
    step = DipForwardBackward(program, Executor(rank, transport(world, rank), clock), delivery, clock)
    losses = []
    data: Any = iter([b for i in range(iterations) for b in batches(case, seed=i)])
    read = forward_step
    if case.sparse:
        read, data = partial(sparse_forward_step, rank, world), data if rank in (0, world - 1) else None
    for _ in range(iterations):
        for chunk in chunks:
            chunk.zero_grad(set_to_none=True)
        losses.append(
            step(ScheduleCall(forward_step_func=read, data_iterator=data, model=chunks,
                 num_microbatches=len(case.images), forward_only=False))
        )  # fmt: skip
    delivery.close()
    return losses, gradients(chunks)
