"""A tiny LLaVA whose language model is a mixture of experts that two replicas share, its ViT frozen."""

from __future__ import annotations

from typing import Any

import torch

from tests.patience import APART
from tests.runtime import llava_case
from tests.runtime.experts_case import EXPERTS, Ranks, deviation, found, initialize, wrapped
from tests.runtime.experts_case import ExpertsCase as Wrap
from tests.runtime.llava_case import Case, freeze_arguments, llava_kwargs
from tests.runtime.planned_run import planned_run

STAGES = 2


def kwargs_of(case: Case, pp: int, replicas: int) -> dict[str, Any]:
    """Keyword arguments of LLaVAModel, with experts in every layer of its language model."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    language = llava_case.config(
        case, case.layers[1], pp, num_moe_experts=EXPERTS, moe_ffn_hidden_size=24, moe_router_topk=2,
        moe_token_dispatcher_type="alltoall", add_bias_linear=False, expert_model_parallel_size=replicas,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.05,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    return llava_kwargs(case, pp) | {
        "language_transformer_config": language, "language_transformer_layer_spec": spec,
        "language_position_embedding_type": "rope",
    }  # fmt: skip


def batches(case: Case, replica: int, replicas: int) -> list[Any]:
    """This replica's of a global batch."""
    own = len(case.images) // replicas
    return llava_case.batches(case)[own * replica : own * (replica + 1)]


def megatrons(rank: int, world: int, case: Case) -> Any:
    """Of Megatron's own schedule, without a pipeline: in one, its LLaVA pads what its routers see."""
    initialize(world, Ranks(pp=1, ep=world))
    from megatron.core.enums import ModelType
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from dip_megatron.families.shared.weights import draw_by_name

    model = LLaVAModel(**kwargs_of(case, 1, world))
    model.freeze(**freeze_arguments(case))
    model.model_type = ModelType.encoder_or_decoder
    draw_by_name([model], 7, deviation)
    chunks = wrapped(Wrap(0), [model])
    own = batches(case, rank, world)
    losses = get_forward_backward_func()(
        forward_step_func=llava_case.forward_step, data_iterator=iter(own), model=chunks, num_microbatches=len(own),
        seq_length=64, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    return found(losses, chunks)


def dips(rank: int, world: int, case: Case, seed: int, exchanges: bool = False) -> Any:
    """Of ours under plans made for both replicas; with ``exchanges`` after they have exchanged microbatches."""
    replicas = world // STAGES
    initialize(world, Ranks(pp=STAGES, ep=replicas))
    from megatron.core import parallel_state

    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.model import ModulePartition, Parallel, Partition
    from dip_megatron.families.describe import describe_llava
    from dip_megatron.families.llava.program import LlavaProgram
    from dip_megatron.families.shared.weights import draw_by_name
    from dip_megatron.megatron.coupling import coupled_ranks, experts_of
    from dip_megatron.megatron.replicas import begin_exchanges
    from dip_megatron.planner.facade import live_maker
    from dip_megatron.planner.model_graphs import ModelGraphs
    from dip_megatron.schedulers.entry import Effort
    from dip_megatron.schedulers.registry import find_schedule

    kwargs, frozen = kwargs_of(case, STAGES, replicas), freeze_arguments(case)
    layers = {"vision": case.vision, "language": case.language}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    program = LlavaProgram(kwargs, layers, rank=stage, freeze=frozen)
    chunks: Any = program.build_chunks()
    draw_by_name(chunks, 7, deviation)
    chunks = wrapped(Wrap(0, overlap=True), chunks)
    group, coupled = coupled_ranks()
    model = describe_llava(kwargs, frozen, Parallel(1, STAGES, replicas, False, False, 1, replicas))
    partition = Partition(
        (ModulePartition("vision", case.vision, case.unit_size), ModulePartition("language", case.language, None))
    )
    # Seconds of a slow machine, where what an exchange takes is nothing.
    cluster = load_cluster("cpu")
    graphs = ModelGraphs(model, cluster, partition, offload=False)
    shared: list[Any] = []

    def make(exchange: Any) -> Any:
        shared.append(experts_of(chunks, program.modules, exchange, coupled))
        effort = Effort(evaluations=200, seed=seed, deterministic=True)
        return live_maker(find_schedule("dynamic"), graphs, program.shapes, effort, label="joint", experts=shared[0])

    def begin(delivery: Any, together: Any) -> Any:
        if not exchanges:
            return None
        begun = begin_exchanges(
            graphs, delivery, APART, torch.device("cpu"), "swap", at_call=True, coupled=together, experts=shared[0]
        )
        own = begun._exchange._price
        if own is not None:  # as on a machine so slow that moving takes no time beside it
            begun._exchange._price = lambda given: tuple(1e6 * part for part in own(given))
        return begun

    own = batches(case, parallel_state.get_data_parallel_rank(), replicas)
    losses, seen, collectives = planned_run(
        program, chunks, llava_case.forward_step, own, group, make, coupled, begin_exchanges=begin
    )
    return (*found(losses, chunks), seen, collectives)
