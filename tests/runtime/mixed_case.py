"""Megatron's orders over static stages that mix modalities, through our executor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dip_megatron.core import ModalityModule, StageGraph, Unit
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import LayerRun
from dip_megatron.planner.maker import payloads
from dip_megatron.runtime.transport_choice import TransportKind
from dip_megatron.schedulers import interleaved, one_forward_one_backward, zb_h1, zb_v
from tests.runtime.llava_case import (
    Case,
    batches,
    finalize_without_ddp,
    forward_step,
    gradients,
    initialize,
    llava_kwargs,
    seed_parameters,
)

ORDERS = {"1f1b": one_forward_one_backward, "interleaved": interleaved, "zb-h1": zb_h1, "zb-v": zb_v}


def stages_of(cuts: list[tuple[int, int]]) -> list[list[LayerRun]]:
    """(vision layers, language layers) of each stage; stems and heads as early and as late as they can be."""
    vision, language = sum(c[0] for c in cuts), sum(c[1] for c in cuts)
    stages: list[list[LayerRun]] = []
    seen = [0, 0]
    for v, w in cuts:
        runs = []
        if v:
            runs.append(LayerRun("vision", v, stem=seen[0] == 0, head=seen[0] + v == vision))
        if w:
            runs.append(LayerRun("language", w, stem=seen[1] == 0, head=seen[1] + w == language))
        seen = [seen[0] + v, seen[1] + w]
        stages.append(runs)
    return stages


def drawn_graph(module: ModalityModule, count: int, seed: int) -> StageGraph:
    ranks, virtual_microbatches = len(module.layers[0]), count * module.segments
    draw = np.random.default_rng(seed).uniform(0.2, 2.0, (5, 1, virtual_microbatches, ranks))
    return StageGraph(
        ranks=ranks,
        modules=(module,),
        units=tuple(Unit(i, module.name, i) for i in range(count)),
        forward=draw[0],
        backward=draw[1],
        weight=draw[2],
        fused=draw[1] + draw[2],
        activation=draw[3],
        deferred_activation=draw[4],
        transfer=np.full(virtual_microbatches, 0.05),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, np.inf),
    )


def mixed_run(
    rank: int, world: int, case: Case, cuts: list[tuple[int, int]], order: str, transport: TransportKind
) -> Any:
    """Losses (where they arise) and gradients, named as the reference names them."""
    initialize(world)
    from dip_megatron.families.llava.mixed import MixedLlavaProgram
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.iteration import Iteration
    from dip_megatron.megatron.lookahead import capture_microbatch
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.ipc import IpcTransport
    from dip_megatron.runtime.transport_choice import choose_transport

    back = (False, True) if order == "zb-v" else ()
    program = MixedLlavaProgram(
        llava_kwargs(case, world), stages_of(cuts), rank=rank, ranks=world, reversed_segments=back
    )
    chunks = program.build_chunks()
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    seed_parameters(chunks)
    data = iter(batches(case))
    microbatches = [capture_microbatch(forward_step, data, chunks[-1], program) for _ in case.images]
    loads = [program.load(m) for m in microbatches]
    graph = drawn_graph(program.modules[0], len(loads), 3)
    carried = payloads(graph, tuple(loads), program.shapes)
    plan = make_plan(graph, ORDERS[order](graph), lower_bound=0.0, name=order, payloads=carried)
    verify(plan)
    device = torch.device("cpu")
    clock = Clock(device)
    carrier = choose_transport(
        list(range(world)), rank, device, 60.0, GlooExchange(list(range(world)), 60.0), transport
    )
    executor = Executor(rank, carrier, clock)
    iteration = Iteration(program, executor, plan, chunks, microbatches, forward_step, loss_rank=program.loss_rank)
    iteration.run()
    torch.distributed.barrier()
    if isinstance(carrier, IpcTransport):
        carrier.close()
    return [iteration.losses], gradients(chunks)
