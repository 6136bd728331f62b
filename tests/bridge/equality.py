"""A family's tiny model under Megatron's own schedules and in segments, on the same weights and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bridge.tiny import TINY, Tiny
from tests.processes import transport
from tests.runtime.llava_case import finalize_without_ddp, gradients, initialize
from tests.runtime.program_case import DrawnUnitGraphs
from tests.runtime.split_case import Drawn, DrawnMaker

MICROBATCHES = 5


@dataclass(frozen=True)
class Case:
    """``layers`` of each module, ``[segment][rank]``; units of ``unit_size`` instances; ``frozen`` parts."""

    tiny: str
    folder: Path
    layers: dict[str, tuple[tuple[int, ...], ...]]
    unit_size: int | None = 1
    seed: int = 0
    frozen: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ("none",)

    @property
    def of(self) -> Tiny:
        return TINY[self.tiny]


def provider_of(case: Case, world: int) -> tuple[Any, Any]:
    """Bridge of the folder, and the model's provider."""
    from megatron.bridge import AutoBridge
    from megatron.core.process_groups_config import ProcessGroupCollection

    initialize(world)
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # families of one process differ in what they ask for
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    bridge = AutoBridge.from_hf_pretrained(case.folder, dtype=torch.float32, trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = torch.float32
    provider.bf16 = provider.fp16 = provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization, provider.pipeline_model_parallel_size = True, world
    for part in ("language_model", "vision_model", "vision_projection"):
        setattr(provider, f"freeze_{part}", part in case.frozen)
    case.of.change(provider)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return bridge, provider


def finalize(model: list[torch.nn.Module], num_tokens: Any = None, **_: Any) -> None:
    """As finalize_model_grads does, for modules without DDP: tied embeddings, and the number of tokens."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import _allreduce_word_embedding_grads
    from megatron.core.utils import get_model_config

    for chunk in model:
        if not hasattr(chunk, "pre_process"):  # of the model inside, which isn't looked at
            return finalize_without_ddp(model, num_tokens)
        chunk.ddp_config = DistributedDataParallelConfig()  # type: ignore[assignment]
    _allreduce_word_embedding_grads(model, get_model_config(model[0]))
    finalize_without_ddp(model, num_tokens)


def batches(case: Case, rank: int) -> list[dict[str, Any]]:
    """Microbatches as Bridge's steps hand them to a rank's model: pixels on the first rank only."""
    found = []
    for i, shown in enumerate(case.of.contents(case.seed, MICROBATCHES)):
        arguments = case.of.arguments(shown, 100 * case.seed + i)
        found.append({name: value for name, value in arguments.items() if rank == 0 or not name.startswith(PIXELS)})
    return found


PIXELS = ("pixel_values", "input_features")
SEEN = (*PIXELS, "image_", "video_", "input_ids", "feature_")


def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """In the manner of Bridge's steps; without labels, it keeps the logits."""
    arguments = next(data_iterator)
    output = model(**arguments)
    if isinstance(output, tuple):  # with a mask beside it
        output = output[0]
    if arguments["labels"] is None:
        return output, lambda logits: (logits.sum() * 0, {"logits": logits.detach().clone()})
    mask = arguments["loss_mask"]

    def loss(losses: torch.Tensor) -> Any:
        mean = (losses.float() * mask).sum() / mask.sum()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def megatrons(rank: int, world: int, case: Case) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and gradients of the model as Bridge builds it, under Megatron's schedule."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    bridge, provider = provider_of(case, world)
    model = provider.provide(pre_process=rank == 0, post_process=rank == world - 1)
    bridge.load_hf_weights([model])
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize
    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches(case, rank)), model=[model],
        num_microbatches=MICROBATCHES, seq_length=96, micro_batch_size=1, forward_only=False,
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
    from dip_megatron.families.called.known import BRIDGE_FAMILIES
    from dip_megatron.megatron.build import record_blueprint

    bridge, provider = provider_of(case, world)
    family, blueprint = record_blueprint(BRIDGE_FAMILIES, provider.provide, pre_process=True, post_process=True)
    program: Any = family.program(blueprint, case.layers, rank=rank, micro_batch_size=1)
    model = family.describe(blueprint, Parallel(pp=world))
    chunks = program.build_chunks()
    bridge.load_hf_weights(chunks)
    return bridge, program, chunks, model


def dips(rank: int, world: int, case: Case, logits: bool = False) -> Any:
    """Losses and gradients of one iteration in segments under a drawn plan, and the weights as they are exported;
    or the logits."""
    from dip_megatron.describe.cost import load_cluster
    from dip_megatron.describe.cost.graph import build_graph
    from dip_megatron.describe.model import ModulePartition, Partition
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.planner.delivery import PlanDelivery
    from dip_megatron.planner.service import PlannerService
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor

    bridge, program, chunks, model = build(rank, world, case)
    exported = {name: t.clone() for name, t in bridge.export_hf_weights(chunks, cpu=True, show_progress=False)}
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize
        if logits:
            case.of.logits(chunk)
    clock = Clock(torch.device("cpu"))
    units = {m.name: case.unit_size if m.encodes else None for m in model.modules}
    split = 0.0 if case.of.experts else 0.3  # Transformer Engine's grouped linears can't wait
    drawn = Drawn(case.seed, split=split, strategies=case.strategies)
    maker = DrawnMaker(DrawnUnitGraphs(model, program.modules, units, case.seed), program.shapes, drawn)
    service = PlannerService(maker, workers=0) if rank == 0 else None
    delivery = PlanDelivery(GlooExchange(list(range(world)), 60.0), service)
    step = DipForwardBackward(program, Executor(rank, transport(world, rank), clock), delivery, clock)
    data = batches(case, rank)
    if logits:
        data = [arguments | {"labels": None} for arguments in data]
    found = step(
        forward_step_func=forward_step, data_iterator=iter(data), model=chunks, num_microbatches=len(data),
        forward_only=logits,
    )  # fmt: skip
    delivery.close()
    if logits:
        return [one["logits"] for one in found]
    if rank == 0:  # the planner prices it, as described
        partition = Partition(tuple(ModulePartition(name, case.layers[name], units[name]) for name in units))
        build_graph(model, load_cluster("cpu"), partition, [program.load(_inputs(program, a)) for a in data])
    return [one["loss"] for one in found], gradients(chunks), exported


def _inputs(program: Any, arguments: dict[str, Any]) -> Any:
    from dip_megatron.runtime.protocol import MicrobatchInputs

    return MicrobatchInputs(program.bind(**arguments))


def together(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of all ranks by name."""
    return {name: gradient for part in parts for name, gradient in part.items()}
