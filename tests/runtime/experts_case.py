"""A tiny GPT with mixtures of experts on real processes: Megatron's own schedule, and ours on the same weights and
batches. Single precision: Megatron's CPU path keeps routing probabilities in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch

from dip_megatron.families.shared.weights import draw_by_name, global_name
from dip_megatron.megatron.cpu import install_cpu_platform
from tests.runtime.gpt_case import LENGTH, GptCase, forward_step
from tests.runtime.gpt_case import batches as gpt_batches
from tests.runtime.llava_case import VOCABULARY
from tests.runtime.planned_run import planned_run
from tests.runtime.split_case import Drawn, DrawnMaker
from tests.sequence_shards import allow_local_norms

EXPERTS = 4


@dataclass(frozen=True)
class Ranks:
    """Parallel sizes of a team of ``tp * pp * dp`` processes; ``dp`` is what is left."""

    pp: int = 2
    tp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1


@dataclass(frozen=True)
class ExpertsCase:
    """What to train: microbatches, layers per chunk, which layers have experts (as ``moe_layer_freq`` lists them) and
    further fields of Megatron's config, depths of multi-token prediction. Each replica has microbatches of its own, of
    ``lengths`` one after the other (none: all alike). Parameters whose names match ``frozen`` don't train."""

    microbatches: int
    layers: tuple[tuple[int, ...], ...] = ((2, 2),)
    experts: tuple[int, ...] = (0, 1, 1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    overlap: bool = False
    mtp: int = 0
    lengths: tuple[int, ...] = ()
    frozen: str = ""


def initialize(world: int, ranks: Ranks) -> None:
    """torch.distributed and Megatron's groups on this process."""
    install_cpu_platform()
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=ranks.tp, pipeline_model_parallel_size=ranks.pp,
            context_parallel_size=ranks.cp, expert_model_parallel_size=ranks.ep, expert_tensor_parallel_size=ranks.etp,
            get_embedding_ranks=lambda group: [group[0], group[-1]] if len(group) > 1 else group,
        )  # fmt: skip
        allow_local_norms()
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    _forget_metrics()


def _forget_metrics() -> None:
    """Megatron logs losses of experts in arrays of one model's size, which another test's may not fit."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # 0.16
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
        return
    destroy_moe_metrics_tracker()


def gpt_kwargs(case: ExpertsCase, ranks: Ranks) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel, its spec listing the layers of the whole model."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from dip_megatron.compat.layer_specs import specs_of_all_layers
    from dip_megatron.families.shared.sdpa import with_sdpa

    config = TransformerConfig(
        num_layers=len(case.experts), hidden_size=32, num_attention_heads=4, ffn_hidden_size=48,
        num_moe_experts=EXPERTS, moe_ffn_hidden_size=24, moe_layer_freq=list(case.experts), moe_router_topk=2,
        moe_token_dispatcher_type="alltoall", add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, use_cpu_initialization=True,
        tensor_model_parallel_size=ranks.tp, sequence_parallel=ranks.tp > 1, pipeline_model_parallel_size=ranks.pp,
        expert_model_parallel_size=ranks.ep, expert_tensor_parallel_size=ranks.etp, pipeline_dtype=torch.float32,
        context_parallel_size=ranks.cp,
        hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False,
        mtp_num_layers=case.mtp or None, variable_seq_lengths=bool(case.lengths), **case.options,
    )  # fmt: skip
    with specs_of_all_layers():
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        if ranks.cp > 1:  # the local attention knows no shards of sequences
            spec.layer_specs = [with_sdpa(layer) for layer in spec.layer_specs]
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if case.mtp else None
    return {
        "config": config,
        "transformer_layer_spec": spec,
        "mtp_block_spec": mtp,
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }


def deviation(name: str, parameter: torch.nn.Parameter) -> float | None:
    """Of drawn weights; the routers' are large, so that no two experts are as good as each other to the last bit."""
    return None if parameter.dim() < 2 else 0.5 if "router" in name else 0.05


def batches(case: ExpertsCase) -> list[dict[str, torch.Tensor]]:
    """This replica's."""
    from megatron.core import parallel_state

    first = case.microbatches * parallel_state.get_data_parallel_rank()
    found = gpt_batches(GptCase(first + case.microbatches))
    for item, length in zip(found, cycle(case.lengths) if case.lengths else (), strict=False):
        item.update({name: tensor[:, :length] for name, tensor in item.items()})
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if ranks > 1:  # two pieces of each sequence, one from either end, as Megatron's scripts cut it
        for item in found:
            for name, tensor in item.items():
                pieces = tensor.chunk(2 * ranks, dim=1)
                item[name] = torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]], dim=1)
    return found[first:]


def wrapped(case: ExpertsCase, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Chunks in DDP over the data-parallel ranks, experts over theirs, ending an iteration as training does."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    for chunk in chunks if case.frozen else ():
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not re.search(case.frozen, global_name(chunk, name)))
    settings = DistributedDataParallelConfig(overlap_grad_reduce=case.overlap, grad_reduce_in_fp32=True)
    out = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    for chunk in out:
        chunk.zero_grad_buffer()
        chunk.config.finalize_model_grads_func = finalize_model_grads
    if case.overlap:
        out[0].config.no_sync_func = out[0].no_sync if len(out) == 1 else [c.no_sync for c in out]
    return out


def found(losses: list[Any], chunks: list[torch.nn.Module]) -> Any:
    """Losses, gradients by name and shard, and counts of tokens per expert, of this rank."""
    from megatron.core import parallel_state as state

    grads, buffers = {}, {}
    for chunk in chunks:
        for local, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            name = global_name(chunk, local)
            expert = "local_experts" in name
            shard = state.get_expert_tensor_parallel_rank() if expert else state.get_tensor_model_parallel_rank()
            grads[name, shard] = parameter.main_grad.detach().clone()
        for local, buffer in chunk.named_buffers():
            if "expert" in local:
                buffers[global_name(chunk, local)] = buffer.double().tolist()
    return losses, grads, buffers


def megatrons(rank: int, world: int, ranks: Ranks, case: ExpertsCase) -> Any:
    """Of Megatron's own 1F1B, whose layers must be even."""
    initialize(world, ranks)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from dip_megatron.compat.layer_specs import spec_of_chunk

    kwargs = gpt_kwargs(case, ranks)
    each, stage = len(case.experts) // ranks.pp, parallel_state.get_pipeline_model_parallel_rank()
    spec = spec_of_chunk(kwargs["transformer_layer_spec"], each * stage, each, len(case.experts))
    first, last = stage == 0, stage == ranks.pp - 1
    own = kwargs | {"transformer_layer_spec": spec} | ({} if last else {"mtp_block_spec": None})
    model = GPTModel(**own, pre_process=first, post_process=last)
    draw_by_name([model], 7, deviation)
    chunks = wrapped(case, [model])
    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches(case)), model=chunks,
        num_microbatches=case.microbatches, seq_length=LENGTH, micro_batch_size=1, decoder_seq_length=LENGTH,
        forward_only=False,
    )  # fmt: skip
    return found(losses, chunks)


def dips(rank: int, world: int, ranks: Ranks, case: ExpertsCase, drawn: Drawn) -> Any:
    """Of ours under a drawn plan, and the kinds of operations that ran."""
    from dip_megatron.megatron.ranks import replica_ranks
    from tests.runtime.dip_case import DrawnGraphs

    program, chunks = built(world, ranks, case)
    maker = DrawnMaker(DrawnGraphs(program.modules, 1, drawn.seed), program.shapes, drawn)
    return ran(case, program, chunks, replica_ranks(), lambda _: maker)


def dips_together(
    rank: int, world: int, ranks: Ranks, case: ExpertsCase, seed: int, room: float | None = None,
    schedule: str = "dynamic",
) -> Any:  # fmt: skip
    """Of ours where replicas share experts: under plans that a counted search makes for all of them, or another
    ``schedule``, with ``room`` for such a share of what the microbatches of a replica keep in all."""

    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.model import ModulePartition, Parallel, Partition
    from dip_megatron.describe.workload import Microbatch
    from dip_megatron.families.describe import describe_gpt
    from dip_megatron.megatron.coupling import coupled_ranks, experts_of
    from dip_megatron.planner.facade import live_maker
    from dip_megatron.planner.model_graphs import ModelGraphs
    from dip_megatron.schedulers.entry import Effort
    from dip_megatron.schedulers.registry import find_schedule

    program, chunks = built(world, ranks, case)
    joined = case.options.get("moe_router_load_balancing_type") == "global_aux_loss"
    dp = world // ranks.pp // ranks.tp
    parallel = Parallel(ranks.tp, ranks.pp, dp, ranks.tp > 1, False, 1, ranks.ep, ranks.etp, joined)
    group, coupled = coupled_ranks(joined)

    def make(exchange: Any) -> Any:
        experts = experts_of(chunks, program.modules, exchange, coupled)
        model = describe_gpt(gpt_kwargs(case, ranks), parallel)
        partition = Partition((ModulePartition("language", case.layers, None),))
        graphs = ModelGraphs(model, load_cluster("cpu"), partition, offload=False)
        if room is not None:
            held = graphs.build(tuple(Microbatch(n, sequences=(n,)) for n in case.lengths[: case.microbatches]), False)
            limit = held.static_bytes.max() + room * held.activation[0].sum(axis=0).max()
            graphs = replace(graphs, memory_limit=float(limit))
        effort = Effort(evaluations=200, seed=seed, deterministic=True)
        return live_maker(find_schedule(schedule), graphs, program.shapes, effort, label="drawn", experts=experts)

    return ran(case, program, chunks, group, make, coupled)


def own_loop(rank: int, world: int, ranks: Ranks, case: ExpertsCase) -> Any:
    """Of ours in a loop of one's own, which tells DIP no more than its model's config says; and how many replicas plan
    together."""
    initialize(world, ranks)
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import schedules

    import dip_megatron
    from dip_megatron.megatron.hooks import Hooks

    dip_megatron.install()
    kwargs = gpt_kwargs(case, ranks)
    stages = dip_megatron.build_model(
        lambda **stage: GPTModel(**kwargs, **stage), micro_batch_size=1, num_microbatches=case.microbatches,
        schedule="dynamic", planner_workers=0, search_evaluations=200,
        modules={"language": {"layers": [list(line) for line in case.layers]}},
    )  # fmt: skip
    draw_by_name(stages, 7, deviation)
    chunks = wrapped(case, stages)
    losses = schedules.get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches(case)), model=chunks,
        num_microbatches=case.microbatches, seq_length=LENGTH, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    session = Hooks.installed().runs.session
    assert session is not None
    Hooks.installed().runs.end(session)
    return (*found(losses, chunks), session._loop.settings.parallel.coupled)


def built(world: int, ranks: Ranks, case: ExpertsCase) -> Any:
    """The program and its chunks, wrapped."""
    initialize(world, ranks)
    from megatron.core import parallel_state

    from dip_megatron.families.gpt.program import GptProgram

    stage = parallel_state.get_pipeline_model_parallel_rank()
    program = GptProgram(gpt_kwargs(case, ranks), {"language": case.layers}, rank=stage)
    chunks = program.build_chunks()
    assert program.supports_split
    draw_by_name(chunks, 7, deviation)
    return program, wrapped(case, chunks)


def ran(case: ExpertsCase, program: Any, chunks: Any, group: list[int], make: Any, coupled: Any = None) -> Any:
    """Losses, gradients and counts of one iteration, the kinds of operations and strategies that ran, and the
    collectives; see :func:`tests.runtime.planned_run.planned_run`."""
    losses, seen, collectives = planned_run(program, chunks, forward_step, batches(case), group, make, coupled)
    return (*found(losses, chunks), seen, collectives)
