"""Context parallelism: a tiny LLaVA and a tiny text-to-video model whose sequences two ranks of each stage share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dip_megatron.describe.model import Parallel
from tests.runtime import llava_case, t2v_case
from tests.runtime.dip_case import DrawnGraphs
from tests.runtime.llava_case import Case, gradients, initialize, llava_kwargs, seed_parameters
from tests.runtime.planned_run import planned_run
from tests.runtime.program_case import DrawnUnitGraphs, seed
from tests.runtime.split_case import Drawn, DrawnMaker
from tests.runtime.t2v_case import T2vCase

STAGES = 2


def trained(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """In DDP over data- and context-parallel ranks, ending an iteration as training does."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def ran(program: Any, chunks: Any, maker: Any, forward_step: Any, batches: Any, forward_only: bool = False) -> Any:
    """Losses that this rank reports, gradients and what ran."""
    from dip_megatron.megatron.ranks import replica_ranks

    group = replica_ranks()
    assert len(group) == torch.distributed.get_world_size()
    losses, seen, collectives = planned_run(
        program, chunks, forward_step, batches, group, lambda _: maker, forward_only=forward_only
    )
    return losses, gradients(chunks), seen, collectives


def llava(rank: int, world: int, case: Case, drawn: Drawn) -> Any:
    """Of a LLaVA under a drawn plan; and how many images the ViT's first layers were run on here."""
    initialize(STAGES, cp=world // STAGES)
    from megatron.core import parallel_state

    from dip_megatron.families.llava.program import LlavaProgram

    program = LlavaProgram(
        llava_kwargs(case, STAGES), {"vision": case.vision, "language": case.language},
        rank=parallel_state.get_pipeline_model_parallel_rank(), micro_batch_size=case.micro_batch_size,
    )  # fmt: skip
    chunks = program.build_chunks()
    seed_parameters(chunks)
    maker = DrawnMaker(DrawnGraphs(program.modules, case.unit_size, drawn.seed), program.shapes, drawn)
    encoded = [0]

    def count(_: Any, arguments: tuple[Any, ...]) -> None:
        encoded[0] += arguments[0].shape[0]

    chunks[0].register_forward_pre_hook(count)
    return (*ran(program, trained(chunks), maker, llava_case.forward_step, llava_case.batches(case)), encoded[0])


def t2v(rank: int, world: int, case: T2vCase, drawn: Drawn, forward_only: bool = False) -> Any:
    """Of a text-to-video model under a drawn plan; velocities instead of losses, where it is only evaluated."""
    initialize(STAGES, cp=world // STAGES)
    from megatron.core import parallel_state

    from dip_megatron.families.describe import describe_t2v
    from dip_megatron.families.t2v.program import T2vProgram

    kwargs = t2v_case.arguments(case, STAGES)
    for name in ("text_config", "diffusion_config"):
        kwargs[name].context_parallel_size = world // STAGES
    layers = {"language": case.language, "diffusion": case.diffusion}
    program = T2vProgram(kwargs, layers, rank=parallel_state.get_pipeline_model_parallel_rank())
    chunks = program.build_chunks()
    seed(chunks)
    model = describe_t2v(kwargs, {}, Parallel(1, STAGES, 1, False, False, cp=world // STAGES))
    maker = DrawnMaker(
        DrawnUnitGraphs(model, program.modules, case.unit_size, drawn.seed), program.shapes, drawn
    )  # fmt: skip
    batches = t2v_case.batches(case)
    if not forward_only:
        return ran(program, trained(chunks), maker, partial(t2v_case.forward_step, case.loss), batches)
    return ran(program, chunks, maker, sampled, [batch | {"noise": None} for batch in batches], True)


def sampled(data_iterator: Any, model: Any) -> Any:
    """A script's step that asks for velocities."""
    velocities = model(**next(data_iterator))
    return torch.zeros(()), lambda _: (torch.zeros(()), {"velocities": [v.detach() for v in velocities]})


def velocities(rank: int, world: int, case: T2vCase) -> Any:
    """Of the whole model on one rank, clip by clip."""
    initialize(1)
    from dip_megatron.families.t2v.program import TextToVideoModel

    model = TextToVideoModel(**t2v_case.arguments(case, 1))
    seed([model])
    with torch.no_grad():
        return [model(**(batch | {"noise": None})) for batch in t2v_case.batches(case)]
