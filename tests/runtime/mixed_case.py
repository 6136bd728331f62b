"""Megatron's orders over static stages that mix modalities, through our executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dip_megatron.core import ModalityModule, Unit
from dip_megatron.core.lower import make_plan
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.verify import verify
from dip_megatron.describe.model import LayerRun, ModulePartition
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.maker import payloads
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from dip_megatron.runtime.transport_choice import TransportKind
from dip_megatron.schedulers.megatron import interleaved, one_forward_one_backward
from dip_megatron.schedulers.zero_bubble import zb_h1, zb_v
from tests.patience import APART
from tests.runtime import gpt_case, llava_case, t2v_case
from tests.runtime.dip_case import followed
from tests.runtime.drawn_graphs import drawn_graph
from tests.runtime.gpt_case import GptCase
from tests.runtime.llava_case import finalize_without_ddp, gradients, initialize
from tests.runtime.program_case import choose
from tests.runtime.program_case import seed as seed_models
from tests.runtime.t2v_case import T2vCase

ORDERS = {"1f1b": one_forward_one_backward, "interleaved": interleaved, "zb-h1": zb_h1, "zb-v": zb_v}


Cuts = Sequence[tuple[int, ...]]
"""Layers of each module, in the order of modules, for every stage in the order in which a microbatch passes them."""


def stages_of(names: Sequence[str], cuts: Cuts) -> list[list[LayerRun]]:
    """The stages; stems and heads as early and as late as they can be."""
    whole, seen = [sum(counts) for counts in zip(*cuts, strict=True)], [0] * len(names)
    stages: list[list[LayerRun]] = []
    for cut in cuts:
        runs = [
            LayerRun(name, n, stem=before == 0, head=before + n == total)
            for name, n, before, total in zip(names, cut, seen, whole, strict=True)
            if n
        ]
        seen = [before + n for before, n in zip(seen, cut, strict=True)]
        stages.append(runs)
    return stages


@dataclass(frozen=True)
class FixedOrder:
    """Plans in a static order of drawn durations."""

    module: ModalityModule
    order: str
    shapes: Any

    def warm_up(self) -> None:
        pass

    def best(self, request: PlanRequest, give: Any) -> PlanSet:
        return self.quick(request)

    def quick(self, request: PlanRequest) -> PlanSet:
        units = [Unit(i, self.module.name, i) for i in range(len(request.loads))]
        graph = followed(drawn_graph((self.module,), units, 3), request.training)
        carried = payloads(graph, request.loads, self.shapes)
        plan = make_plan(graph, ORDERS[self.order](graph), lower_bound=0.0, name=self.order, payloads=carried)
        verify(plan)
        return PlanSet((plan,))


def program_of(rank: int, world: int, case: Any, cuts: Cuts, order: str) -> tuple[Any, Any, Any, list[Any]]:
    """A rank's program of the case's model, how its weights are drawn, its forward_step, and its microbatches."""
    from dip_megatron.families.gpt.mixed import MixedGptProgram
    from dip_megatron.families.llava.mixed import MixedLlavaProgram
    from dip_megatron.families.t2v.mixed import MixedT2vProgram

    def staged(*names: str) -> ModulePartition:
        return ModulePartition.of_stages(stages_of(names, cuts), world, turned=order == "zb-v")

    if isinstance(case, GptCase):
        kwargs, stages = gpt_case.gpt_kwargs(case, world), staged("language")
        gpt = MixedGptProgram(kwargs, stages, micro_batch_size=case.micro_batch_size, rank=rank)
        return gpt, gpt_case.seed_chunks, gpt_case.forward_step, gpt_case.batches(case)
    if isinstance(case, T2vCase):
        kwargs, stages = t2v_case.arguments(case, world), staged("language", "diffusion")
        t2v = MixedT2vProgram(kwargs, stages, freeze=t2v_case.freeze_arguments(case), rank=rank)
        return t2v, seed_models, partial(t2v_case.forward_step, case.loss), t2v_case.batches(case)
    llava = MixedLlavaProgram(llava_case.llava_kwargs(case, world), staged("vision", "language"), rank=rank)
    return llava, llava_case.seed_parameters, llava_case.forward_step, llava_case.batches(case)


def mixed_run(rank: int, world: int, case: Any, cuts: Cuts, order: str, transport: TransportKind = "gloo") -> Any:
    """Losses (where they arise) and gradients, named as the reference names them."""
    initialize(world)
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.ipc import IpcTransport
    from dip_megatron.runtime.transport_choice import choose_transport

    program, seed, forward_step, items = program_of(rank, world, case, cuts, order)
    chunks = program.build_chunks()
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    seed(chunks)
    if getattr(case, "trains", None):
        choose(chunks, case.trains)
    device = torch.device("cpu")
    clock = Clock(device)
    exchange, pipeline = (GlooExchange(list(range(world)), APART) for _ in range(2))
    carrier = choose_transport(list(range(world)), rank, device, APART, exchange, transport)
    service = PlannerService(FixedOrder(program.modules[0], order, program.shapes), workers=0) if rank == 0 else None
    delivery = PlanDelivery(exchange, service)
    step = DipForwardBackward(program, Executor(rank, carrier, clock), delivery, clock, pipeline=pipeline)
    losses = step(ScheduleCall(
        forward_step_func=forward_step, data_iterator=iter(items), model=chunks, num_microbatches=len(items)
    ))  # fmt: skip
    delivery.close()
    torch.distributed.barrier()
    if isinstance(carrier, IpcTransport):
        carrier.close()
    return [losses], gradients(chunks)
