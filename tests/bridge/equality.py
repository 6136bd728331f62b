"""A family's tiny model under Megatron's own schedules and in segments, on the same weights and batches."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bridge.tiny import TINY
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.bridge.tiny_model import Tiny, packed_row
from tests.bridge.tiny_roll import ROLL_TINY, packed_rows
from tests.patience import APART
from tests.processes import transport
from tests.runtime.llava_case import finalize_without_ddp, gradients, initialize
from tests.runtime.program_case import DrawnUnitGraphs
from tests.runtime.split_case import Drawn, DrawnMaker

MICROBATCHES = 5


@dataclass(frozen=True)
class Case:
    """``layers`` of each module, ``[segment][rank]``; units of ``unit_size`` instances; ``frozen`` parts; ``tensor``
    ranks share each stage, and with ``sequence`` the norms' work, too; ``context`` ranks share each sequence.
    ``by_token``: the loss is the mean over the tokens of all microbatches. ``packed``: each microbatch is a row of two
    samples, of unlike lengths. ``given`` are settings of Bridge's provider."""

    tiny: str
    folder: Path
    layers: dict[str, tuple[tuple[int, ...], ...]]
    unit_size: int | None = 1
    seed: int = 0
    frozen: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ("none",)
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    by_token: bool = False
    packed: bool = False
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def of(self) -> Tiny:
        return (TINY | MCORE_TINY | ROLL_TINY)[self.tiny]

    @property
    def ranks(self) -> int:
        """Of each stage."""
        return self.tensor * self.context


def provider_of(case: Case, world: int) -> tuple[Any, Any]:
    """Bridge of the folder, and the model's provider; or mcore-bridge as both."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    stages = world // case.ranks
    initialize(stages, case.tensor, case.context)
    destroy_moe_metrics_tracker()  # which has as many layers as the first model of a process
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # families of one process differ in what they ask for
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    if case.tiny in MCORE_TINY:
        from tests.bridge.mcore_models import McoreModels

        models = McoreModels(case.folder, stages, case.tensor, case.sequence, case.of.predicts)
        return models, models
    if case.tiny in ROLL_TINY:
        from tests.bridge.roll_models import RollModels

        roll = RollModels(case.folder, stages, case.tensor, case.sequence, case.context)
        return roll, roll
    from megatron.bridge import AutoBridge
    from megatron.core.process_groups_config import ProcessGroupCollection

    bridge = AutoBridge.from_hf_pretrained(case.folder, dtype=torch.float32, trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = torch.float32
    provider.bf16 = provider.fp16 = provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization, provider.pipeline_model_parallel_size = True, stages
    provider.tensor_model_parallel_size, provider.sequence_parallel = case.tensor, case.sequence
    provider.context_parallel_size, provider.calculate_per_token_loss = case.context, case.by_token
    for part in ("language_model", "vision_model", "vision_projection"):
        setattr(provider, f"freeze_{part}", part in case.frozen)
    case.of.change(provider)
    for name, value in case.given.items():
        setattr(provider, name, value)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return bridge, provider


def finalize(model: list[torch.nn.Module], num_tokens: Any = None, **_: Any) -> None:
    """As finalize_model_grads does, for modules without DDP: tied embeddings, and the number of tokens."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import (
        _allreduce_non_tensor_model_parallel_grads,
        _allreduce_word_embedding_grads,
    )
    from megatron.core.utils import get_model_config

    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:  # each rank has its share of every microbatch's tokens
        for tensor in [num_tokens, *(p.grad for chunk in model for p in chunk.parameters() if p.grad is not None)]:
            torch.distributed.all_reduce(tensor, group=group)
    config = get_model_config(model[0])
    if getattr(config, "mtp_num_layers", None) and model[-1].post_process:
        # Its embedding, which mcore-bridge's class makes no use of there.
        copied = model[-1].shared_embedding_or_output_weight()
        if copied.requires_grad and copied.grad is None:
            copied.grad = torch.zeros_like(copied)
    for chunk in model:
        chunk.ddp_config = DistributedDataParallelConfig()  # type: ignore[assignment]
    if all(hasattr(chunk, "pre_process") for chunk in model):  # else the model inside has it, which isn't looked at
        _allreduce_word_embedding_grads(model, config)
    if config.tensor_model_parallel_size > 1:
        for parameter in (p for chunk in model for p in chunk.parameters() if p.requires_grad):
            parameter.main_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        _allreduce_non_tensor_model_parallel_grads(model, config)
    finalize_without_ddp(model, num_tokens)


def stage(case: Case, rank: int) -> int:
    """The pipeline rank of a rank: those of a stage are neighbours."""
    return rank // case.ranks


def batches(case: Case, rank: int) -> list[dict[str, Any]]:
    """Microbatches as Bridge's steps hand them to a rank's model: pixels on the first rank only, as a rule."""
    from megatron.core import parallel_state

    from dip_megatron.families.shared.shards import shard_rows

    found, first = [], rank == 0 or case.of.pixels_everywhere
    contents = case.of.contents(case.seed, MICROBATCHES * (1 + case.packed))
    samples = [case.of.arguments(shown, 100 * case.seed + i) for i, shown in enumerate(contents)]
    row = packed_rows if case.tiny in ROLL_TINY else packed
    for arguments in [row(samples[i : i + 2]) for i in range(0, len(samples), 2)] if case.packed else samples:
        if case.context > 1 and case.of.step_shares:  # as the step does
            own = shard_rows([96], case.context, parallel_state.get_context_parallel_rank())
            arguments |= {name: arguments[name][:, own] for name in ("labels", "loss_mask")}
        found.append({name: value for name, value in arguments.items() if first or not name.startswith(PIXELS)})
    return found


def packed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Two in one row, as Bridge's step hands it to the model."""
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    row = packed_row(samples, cut=(3, 10))
    parameters = get_packed_seq_params(row)
    del row["total_tokens"]
    return {n: v for n, v in row.items() if "seqlen" not in n} | {"packed_seq_params": parameters}


PIXELS = ("pixel_values", "input_features")
SEEN = (*PIXELS, "image_", "video_", "input_ids", "feature_")


def forward_step(data_iterator: Iterator[Any], model: Any, by_token: bool = False) -> Any:
    """In the manner of Bridge's steps; without labels, it keeps the logits. ROLL's loop has targets instead, and works
    out losses of logits by itself."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    arguments = dict(next(data_iterator))
    targets = arguments.pop("targets", None)
    output, mask = model(**arguments), arguments["loss_mask"]
    if isinstance(output, tuple):  # with a mask beside it, this rank's share where ranks share a sequence
        mask = mask if len(output) < 2 or output[1] is None else output[1]
        output = output[0]
    if targets is None and arguments["labels"] is None:
        return output, lambda logits: (logits.sum() * 0, {"logits": logits.detach().clone()})

    def loss(losses: torch.Tensor) -> Any:
        if targets is not None:
            losses = vocab_parallel_cross_entropy(losses.float().clone(), targets)
        if by_token:
            total, count = (losses.float() * mask).sum(), mask.sum()
            return total, count.to(torch.int), {"loss": torch.stack([total.detach().clone(), count])}
        mean = (losses.float() * mask).sum() / mask.sum()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def megatrons(rank: int, world: int, case: Case) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and gradients of the model as Bridge builds it, under Megatron's schedule."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    bridge, provider = provider_of(case, world)
    place, stages = stage(case, rank), world // case.ranks
    model = provider.provide(pre_process=place == 0, post_process=place == stages - 1)
    bridge.load_hf_weights([model])
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, by_token=case.by_token), data_iterator=iter(batches(case, place)),
        model=[model], num_microbatches=MICROBATCHES, seq_length=96, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    return [step["loss"] for step in losses], gradients([model])


def hugging_face(rank: int, world: int, case: Case) -> list[torch.Tensor]:
    """Logits of Hugging Face's own model."""
    # Made again: from_pretrained leaves buffers that are in no file as they are in memory, under the CPU platform.
    loaded = case.of.made().eval()
    found = []
    with torch.no_grad():
        for arguments in batches(case, 0):
            given = {name: value for name, value in arguments.items() if name.startswith(SEEN)}
            found.append(case.of.text(loaded)(**given, **case.of.hugging_face(given)).logits)
    return found


def build(rank: int, world: int, case: Case) -> tuple[Any, Any, list[Any], Any]:
    """Bridge, the program, its chunks with the folder's weights, and the model in the planner's words."""
    from dip_megatron.describe.model import Parallel
    from dip_megatron.megatron.build import record_blueprint

    bridge, provider = provider_of(case, world)
    module, name = "bridge_models", "BRIDGE_FAMILIES"
    if case.tiny in MCORE_TINY:
        module, name = "mcore_bridge_models", "MCORE_BRIDGE_FAMILIES"
    if case.tiny in ROLL_TINY:
        module, name = "roll_models", "ROLL_FAMILIES"
    families = getattr(importlib.import_module(f"dip_megatron.families.multimodal.{module}"), name)
    family, blueprint = record_blueprint(families, provider.provide, pre_process=True, post_process=True)
    program: Any = family.program(blueprint, case.layers, rank=stage(case, rank), micro_batch_size=1)
    parallel = Parallel(case.tensor, world // case.ranks, sequence_parallel=case.sequence, cp=case.context)
    model = family.describe(blueprint, parallel)
    chunks = program.build_chunks()
    # Plans say what is recomputed, alone.
    assert not any(getattr(module, "gradient_checkpointing", False) for chunk in chunks for module in chunk.modules())
    if case.tiny in ROLL_TINY:
        bridge.mark(chunks, case.layers["language"], stage(case, rank))
    bridge.load_hf_weights(chunks)
    return bridge, program, chunks, model


def dips(rank: int, world: int, case: Case, logits: bool = False) -> Any:
    """Losses and gradients of one iteration in segments under a drawn plan, and the weights as they are exported;
    or the logits."""
    from megatron.core import parallel_state

    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.cost.graph import build_graph
    from dip_megatron.describe.model import ModulePartition, Partition
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.planner.delivery import PlanDelivery
    from dip_megatron.planner.service import PlannerService
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.transport import DistributedTransport

    bridge, program, chunks, model = build(rank, world, case)
    # In float, as Bridge would export experts of Kimi-K2.5 in four bits, as they are published.
    given = {"cpu": True, "show_progress": False, "weight_dtype": torch.float32}
    exported = {name: t.clone() for name, t in bridge.export_hf_weights(chunks, **given)}
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize
        if logits:
            case.of.logits(chunk)
    clock = Clock(torch.device("cpu"))
    units = {m.name: case.unit_size if m.encodes else None for m in model.modules}
    drawn = Drawn(case.seed, split=0.3, strategies=case.strategies)
    maker = DrawnMaker(DrawnUnitGraphs(model, program.modules, units, case.seed), program.shapes, drawn)
    service = PlannerService(maker, workers=0) if rank == 0 else None
    delivery = PlanDelivery(GlooExchange(list(range(world)), APART), service)
    place = stage(case, rank)
    of = torch.distributed.get_process_group_ranks
    pipeline = of(parallel_state.get_pipeline_model_parallel_group())
    tensor = of(parallel_state.get_tensor_model_parallel_group())
    carrier = (
        transport(world, rank) if case.ranks == 1 else DistributedTransport(pipeline, place, torch.device("cpu"), APART)
    )
    step = DipForwardBackward(
        program, Executor(place, carrier, clock), delivery, clock,
        tensor_parallel=GlooExchange(tensor, APART) if len(tensor) > 1 else None,
    )  # fmt: skip
    copied = any(m.replicated for m in program.modules)
    data = batches(case, 0 if copied else place)
    if logits:
        data = [arguments | {"labels": None, "targets": None} for arguments in data]
    found = step(ScheduleCall(
        forward_step_func=partial(forward_step, by_token=case.by_token), data_iterator=iter(data), model=chunks,
        num_microbatches=len(data), forward_only=logits,
    ))  # fmt: skip
    delivery.close()
    if logits:
        return [one["logits"] for one in found]
    if rank == 0:  # the planner prices it, as described
        partition = Partition(
            tuple(ModulePartition(m.name, m.layers, units[m.name], m.replicated) for m in program.modules)
        )
        build_graph(model, load_cluster("cpu"), partition, [program.load(_inputs(program, a)) for a in data])
    return [one["loss"] for one in found], gradients(chunks), exported


def _inputs(program: Any, arguments: dict[str, Any]) -> Any:
    from dip_megatron.runtime.protocol import MicrobatchInputs

    return MicrobatchInputs(program.bind(**{n: v for n, v in arguments.items() if n != "targets"}))


def together(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of all ranks by name."""
    return {name: gradient for part in parts for name, gradient in part.items()}
