"""Models of which only some parameters train, as scripts make them: Megatron's own run, and ours from plans.

``trains`` are expressions, one an iteration (:func:`tests.runtime.program_case.choose`). They are applied to models and
chunks that are built already, as a script does after ``get_model``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from dip_megatron.core import Communicate, CommunicationKind, Kind, OperationGraph, Plan
from dip_megatron.describe.model import Training
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.service import PlannerService
from tests.patience import APART
from tests.processes import transport
from tests.runtime import gpt_case, llava_case
from tests.runtime.dip_case import DrawnGraphs
from tests.runtime.gpt_case import GptCase
from tests.runtime.llava_case import Case, finalize_without_ddp, gradients, initialize, seed_parameters
from tests.runtime.program_case import choose
from tests.runtime.split_case import Drawn, DrawnMaker, with_ddp

ALL = ""
RANK = 2


@dataclass(frozen=True)
class Trained:
    """``case`` is a LLaVA or a GPT; ``adapters`` are low-rank matrices beside the frozen linears of all attentions: of
    ``megatron``'s linears, ``torch``'s, or of a class of its own (``other``). With ``ddp`` chunks are wrapped first and
    what trains is chosen then; ``stubborn`` plans are for a frozen encoder."""

    case: Case | GptCase
    trains: tuple[str, ...] = (ALL,)
    adapters: str = ""
    ddp: bool = False
    stubborn: bool = False


@dataclass(frozen=True)
class StubbornGraphs(DrawnGraphs):
    """Takes the encoder for frozen, whatever trains."""

    def build(self, loads: Any, forward_only: bool, training: Training | None = None) -> OperationGraph:
        graph = super().build(loads, forward_only)
        encoder = replace(graph.modules[0], trainable=tuple((False,) * graph.ranks for _ in graph.modules[0].layers))
        return replace(graph, modules=(encoder, *graph.modules[1:]))


class Other(torch.nn.Linear):
    """Multiplies in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def adapted(base: type, kind: str) -> type:
    """One of Megatron's linears, frozen, with an adapter."""

    class Adapted(base):  # type: ignore[misc]
        def __init__(self, input_size: int, output_size: int, *args: Any, **kwargs: Any):
            from megatron.core.tensor_parallel.layers import ColumnParallelLinear

            super().__init__(input_size, output_size, *args, **kwargs)
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            for name, shape in (("adapter_down", (input_size, RANK)), ("adapter_up", (RANK, output_size))):
                if kind in ("torch", "other"):
                    linear: Any = {"torch": torch.nn.Linear, "other": Other}[kind](*shape, bias=False)
                else:
                    linear = ColumnParallelLinear(
                        *shape, config=kwargs["config"], init_method=torch.nn.init.zeros_, bias=False
                    )
                setattr(self, name, linear)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output, bias = super().forward(x, *args, **kwargs)
            return output + _output(self.adapter_up(_output(self.adapter_down(x)))), bias

    return Adapted


def _output(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _arguments(trained: Trained, pp: int) -> dict[str, Any]:
    case = trained.case
    kwargs = gpt_case.gpt_kwargs(case, pp) if isinstance(case, GptCase) else llava_case.llava_kwargs(case, pp)
    if trained.adapters:
        for name in [n for n in kwargs if n.endswith("layer_spec") and n != "vision_projection_layer_spec"]:
            spec = kwargs[name] = copy.deepcopy(kwargs[name])
            attention = spec.submodules.self_attention.submodules
            attention.linear_qkv = adapted(attention.linear_qkv, trained.adapters)
            attention.linear_proj = adapted(attention.linear_proj, trained.adapters)
    return kwargs


def reference(rank: int, world: int, trained: Trained) -> list[Any]:
    """Losses and gradients of the whole model without a pipeline, an iteration each."""
    initialize(1)
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    case, kwargs = trained.case, _arguments(trained, 1)
    model: Any
    of: Any
    if isinstance(case, GptCase):
        model, of, longest = GPTModel(**kwargs, pre_process=True, post_process=True), gpt_case, gpt_case.LENGTH
    else:
        model, of = LLaVAModel(**kwargs, pre_process=True, post_process=True), llava_case
        longest = kwargs["language_max_sequence_length"]
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_without_ddp
    seed_parameters([model])
    out = []
    for expression in trained.trains:
        choose([model], expression)
        model.zero_grad(set_to_none=True)
        data = of.batches(case)
        losses = get_forward_backward_func()(
            forward_step_func=of.forward_step, data_iterator=iter(data), model=[model], num_microbatches=len(data),
            seq_length=longest, micro_batch_size=case.micro_batch_size, decoder_seq_length=longest, forward_only=False,
        )  # fmt: skip
        out.append((losses, gradients([model])))
    return out


def dip_run(rank: int, world: int, trained: Trained, drawn: Drawn) -> list[Any]:
    """An iteration each: losses, gradients on this rank, what it ran as (module, kind), and the modules that gradients
    were sent to."""
    initialize(world)
    from dip_megatron.families.gpt.program import GptProgram
    from dip_megatron.families.llava.program import LlavaProgram
    from dip_megatron.megatron.call import ScheduleCall
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor

    case, kwargs = trained.case, _arguments(trained, world)
    program: Any
    of: Any
    if isinstance(case, GptCase):
        of, unit_size = gpt_case, 1
        program = GptProgram(kwargs, {"language": case.layers}, rank=rank, micro_batch_size=case.micro_batch_size)
    else:
        of, unit_size = llava_case, case.unit_size
        layers = {"vision": case.vision, "language": case.language}
        program = LlavaProgram(kwargs, layers, rank=rank, micro_batch_size=case.micro_batch_size)
    chunks = program.build_chunks()
    seed_parameters(chunks)
    if trained.ddp:
        chunks = with_ddp(chunks, overlap=True)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    clock = Clock(torch.device("cpu"))
    graphs = (StubbornGraphs if trained.stubborn else DrawnGraphs)(program.modules, unit_size, drawn.seed)
    maker = DrawnMaker(graphs, program.shapes, drawn)
    service = PlannerService(maker, workers=0) if rank == 0 else None
    delivery = PlanDelivery(GlooExchange(list(range(world)), APART), service)
    ran: list[tuple[str, Kind]] = []
    sent: list[str] = []

    def seen(report: Any, plan: Plan, spans: Any) -> None:
        ran.extend((s.operation.module, s.operation.kind) for s in spans)
        sent.extend(
            a.message.target.module
            for a in plan.actions[rank]
            if isinstance(a, Communicate) and a.kind is CommunicationKind.ISEND and a.message.channel.gradient
        )

    step = DipForwardBackward(
        program, Executor(rank, transport(world, rank), clock), delivery, clock, on_iteration=seen
    )
    data = of.batches(case)
    iterator = iter(data * len(trained.trains))
    out = []
    for expression in trained.trains:
        choose(chunks, expression)
        for chunk in chunks:
            chunk.zero_grad_buffer() if trained.ddp else chunk.zero_grad(set_to_none=True)
        losses = step(ScheduleCall(
            forward_step_func=of.forward_step, data_iterator=iterator, model=chunks, num_microbatches=len(data),
            forward_only=False,
        ))  # fmt: skip
        out.append((losses, gradients(chunks), tuple(ran), tuple(sent), program.supports_split))
        ran.clear()
        sent.clear()
    delivery.close()
    return out
