"""Any stage program on real processes beside the plain model: Megatron's own run without a pipeline, and ours, on the
same weights and batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dip_megatron.core import Kind, ModalityModule, OperationGraph
from dip_megatron.describe.model import MultimodalModel, Training
from dip_megatron.describe.workload import Microbatch, make_units
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.model_graphs import without_training
from dip_megatron.planner.service import PlannerService
from tests.patience import APART
from tests.processes import transport
from tests.runtime.dip_case import followed
from tests.runtime.drawn_graphs import drawn_graph
from tests.runtime.llava_case import finalize_without_ddp, global_name, gradients
from tests.runtime.split_case import Drawn, DrawnMaker


def tiny_config(layers: int, hidden: int, pp: int, **more: Any) -> Any:
    """A TransformerConfig in double precision (see :func:`seed`), without dropout or fused kernels."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=4, use_cpu_initialization=True,
        pipeline_model_parallel_size=pp, params_dtype=torch.float64, pipeline_dtype=torch.float64, hidden_dropout=0.0,
        attention_dropout=0.0, deallocate_pipeline_outputs=True, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, **more,
    )  # fmt: skip


def split_dimension(parameter: torch.nn.Parameter) -> int | None:
    """Along which dimension tensor parallelism splits it."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def seed(models: list[torch.nn.Module]) -> None:
    """The same weights whatever the partition, each rank its shards of them.

    In double precision: in single, sums over parts of a microbatch differ from those over the whole by a few millionths
    where gradients are small sums of large terms, and an error as small could hide there.
    """
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for model in models:
        model.double()  # Megatron's norms are built in single precision
        for local, parameter in model.named_parameters():
            name, shape, split = global_name(model, local), list(parameter.shape), split_dimension(parameter)
            if getattr(model, "share_embeddings_and_output_weights", False):  # of a tied head
                name = name.replace("output_layer", "embedding.word_embeddings")
            if split is not None:
                shape[split] *= size
            drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64)
            weight *= 0.2 if parameter.dim() > 1 else 0.05
            weight += 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.copy_(weight if split is None else weight.chunk(size, split)[rank])


def choose(models: Sequence[torch.nn.Module], expression: str) -> None:
    """Let those parameters train whose name in the whole model matches, and no others.

    ``coin N`` leaves it to a coin for each parameter, ``module coin N`` for each module (with
    ``--overlap-grad-reduce`` Megatron can't train the bias of a frozen linear).
    """
    for wrapped in models:
        model = wrapped
        while hasattr(model, "module"):
            model = model.module
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_trains(global_name(model, name), expression))


def _trains(name: str, expression: str) -> bool:
    if "coin" in expression:
        name = name.rpartition(".")[0] if expression.startswith("module") else name
        return hashlib.sha256(f"{expression} {name}".encode()).digest()[0] < 100
    return re.search(expression, name) is not None


def plain_run(model: Any, forward_step: Callable[..., Any], batches: Sequence[Any], trains: str | None = None) -> Any:
    """Losses and gradients of a whole model under Megatron's schedule without a pipeline. ``trains`` see
    :func:`choose`."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_without_ddp
    seed([model])
    if trains is not None:
        choose([model], trains)
    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[model], num_microbatches=len(batches),
        seq_length=1, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    return losses, gradients([model])


@dataclass(frozen=True)
class DrawnUnitGraphs:
    """Drawn graphs of any model."""

    model: MultimodalModel
    modules: tuple[ModalityModule, ...]
    unit_size: dict[str, int | None]
    seed: int = 0

    def build(
        self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None
    ) -> OperationGraph:
        units = make_units(self.model, loads, self.unit_size)
        graph = drawn_graph(self.modules, units, self.seed)
        return without_training(graph) if forward_only else followed(graph, training)


def drawn_run(
    rank: int,
    world: int,
    program: Any,
    model: MultimodalModel,
    unit_size: dict[str, int | None],
    drawn: Drawn,
    forward_step: Callable[..., Any],
    batches: Sequence[Any],
    forward_only: bool = False,
    trains: str | None = None,
) -> Any:
    """Losses of one iteration of ``program`` under a drawn plan, gradients on this rank, and the kinds of operations
    that it ran, by module. ``model`` is the planner's view, ``trains`` see :func:`choose`."""
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor

    chunks = program.build_chunks()
    assert program.supports_split
    seed(chunks)
    if trains is not None:
        choose(chunks, trains)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    ranks = list(range(world))
    clock = Clock(torch.device("cpu"))
    maker = DrawnMaker(DrawnUnitGraphs(model, program.modules, unit_size, drawn.seed), program.shapes, drawn)
    delivery = PlanDelivery(GlooExchange(ranks, APART), PlannerService(maker, workers=0) if rank == 0 else None)
    ran: list[tuple[str, Kind]] = []
    step = DipForwardBackward(
        program, Executor(rank, transport(world, rank), clock), delivery, clock,
        on_iteration=lambda report, plan, spans: ran.extend((s.operation.module, s.operation.kind) for s in spans),
    )  # fmt: skip
    losses = step(ScheduleCall(
        forward_step_func=forward_step, data_iterator=iter(batches), model=chunks, num_microbatches=len(batches),
        forward_only=forward_only,
    ))  # fmt: skip
    delivery.close()
    return [losses], gradients(chunks), ran
