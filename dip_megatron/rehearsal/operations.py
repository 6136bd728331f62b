"""A model of which only the description is real: chunks with one number a part, stages that sleep for their price."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ..core import Kind, ModalityModule, Operation, Plan, Unit
from ..describe.model import MultimodalModel, Parallel
from ..describe.workload import Microbatch
from ..families.family import Blueprint, Layers, ModelFamily
from ..runtime.chunk_runner import ChunkRunner
from ..runtime.clock import Clock
from ..runtime.executor import Executor, OperationRunner
from ..runtime.layer_context import LayerContext
from ..runtime.protocol import Inputs, MicrobatchInputs, Tensors
from ..runtime.transport import Transport
from .job import OneNumber, Prices, price


class RehearsedModel(torch.nn.Module):
    """What a rehearsal's provider constructs; never built."""

    def __init__(self, model: MultimodalModel, microbatches: tuple[Microbatch, ...]):
        super().__init__()
        self.model, self.microbatches = model, microbatches


class RehearsedChunk(torch.nn.Module):
    """A chunk: a number for each of its parts, frozen where the description says so."""

    def __init__(self, config: Any, parts: Mapping[str, bool], layers_with_experts: tuple[bool, ...] = ()):
        """``parts``: names, in the order of a pass, each with whether it trains."""
        super().__init__()
        self.layers_with_experts = layers_with_experts
        self.config, self.vp_stage, self.model_type = config, None, None
        for name, trains in parts.items():
            part = torch.nn.Module()
            part.weight = torch.nn.Parameter(torch.ones(1, 1), requires_grad=trains)
            if name == "layers":
                self.layers = torch.nn.ModuleList([part])
            else:
                self.add_module(name, part)

    def set_input_tensor(self, _: Any) -> None:
        """As pipeline stages have it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` ``[1, 1]`` times the numbers, which are all one."""
        for parameter in self.parameters():
            hidden = hidden * parameter
        return hidden


class RehearsedProgram:
    """See :class:`dip_megatron.runtime.protocol.ModelProgram`. Through the stages of a microbatch goes its number, so
    that the losses of an iteration add up to a known sum."""

    supports_split = True

    def __init__(self, blueprint: Blueprint, layers: Layers, *, rank: int):
        """``layers[module][segment][rank]``."""
        self._model: MultimodalModel = blueprint.kwargs["model"]
        self._microbatches: tuple[Microbatch, ...] = blueprint.kwargs["microbatches"]
        self._rank = rank
        shapes = self._model.modules
        self.modules = tuple(ModalityModule(m.name, layers[m.name], m.upstream) for m in shapes)
        self.mode = LayerContext()
        self.shapes = OneNumber()

    def build_chunks(self) -> list[torch.nn.Module]:
        """In the order (module, segment)."""
        config = TransformerConfig(
            num_layers=self._model.parallel.pp, hidden_size=1, num_attention_heads=1, use_cpu_initialization=True,
            pipeline_model_parallel_size=self._model.parallel.pp, pipeline_dtype=torch.float32,
            variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",
        )  # fmt: skip
        last = self._model.parallel.pp - 1
        chunks: list[torch.nn.Module] = []
        for shape, module in zip(self._model.modules, self.modules, strict=True):
            for k, line in enumerate(module.layers):
                present = {
                    "stem": k == 0 and self._rank == 0, "layers": line[self._rank] > 0,
                    "head": k == module.segments - 1 and self._rank == last,
                }  # fmt: skip
                parts = {p: p in shape.trainable for p, here in present.items() if here}
                first = sum(map(sum, module.layers[:k])) + sum(line[: self._rank])
                kinds = shape.kinds[first : first + line[self._rank]]
                chunks.append(RehearsedChunk(config, parts, tuple(kind.experts for kind in kinds)))
        if not any(True for chunk in chunks for _ in chunk.parameters()):
            chunks[-1] = RehearsedChunk(config, {"layers": True})  # a rank of which everything is elsewhere
        return chunks

    def bind(self, **arguments: Any) -> dict[str, Any]:
        """As they are."""
        return arguments

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """What the microbatch of this number holds."""
        return self._microbatches[inputs.arguments["number"]]

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """Nothing."""

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """Nothing."""

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage."""
        return {"hidden": self.final(chunk, inputs, microbatch.arguments)}

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The last stage: the microbatch's number ``[1, 1]``."""
        given = [payload["hidden"] for payload in inputs if "hidden" in payload]
        hidden = torch.cat(given).mean(0, keepdim=True) if given else torch.full((1, 1), float(arguments["number"]))
        found: torch.Tensor = chunk(hidden)
        return found

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """By the number of clips."""
        return unit.count / max(len(self._microbatches[arguments["number"]].clips), 1)


def family(workload: str) -> ModelFamily:
    """The family of rehearsed models."""

    def describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
        model: MultimodalModel = blueprint.kwargs["model"]
        return model

    def program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> Any:
        return RehearsedProgram(blueprint, layers, rank=rank)

    return ModelFamily("rehearsed", RehearsedModel, describe, program, workload)


def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> Any:
    """A pretrain script's: one microbatch, whose loss is its number."""

    def loss_func(output: torch.Tensor) -> Any:
        loss = output.sum()
        return loss, {"number": loss.detach().clone()}

    return model(**next(data_iterator)), loss_func


@dataclass(frozen=True)
class Meeting:
    """Where replicas that share experts meet on this rank's stages: in forwards and backwards of these ``chunks``
    (module, segment). ``group``: a process group of this stage's rank of each replica."""

    chunks: frozenset[tuple[str, int]]
    group: Any

    def longest(self, operation: Operation, seconds: float) -> float:
        """Once all members are there, the most that one of them needs; ``seconds`` where none meet."""
        if operation.kind == Kind.W or (operation.module, operation.segment) not in self.chunks:
            return seconds
        most = torch.tensor([seconds], dtype=torch.float64)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(most)


class _Sleeping:
    """A stage runner whose operations last as long as they cost; see :class:`OperationRunner`."""

    def __init__(self, stages: ChunkRunner, prices: Prices, scale: float, dies: bool, meeting: Meeting | None):
        self._stages, self._prices, self._scale, self._dies = stages, prices, scale, dies
        self._meeting = meeting
        self._numbers = [inputs.arguments["number"] for inputs in stages.microbatches]

    def _begin(self, operation: Operation, unit: Unit, strategy: str) -> float:
        """When the operation ends that begins now, as soon as those are there that it meets."""
        seconds = price(self._prices, self._numbers[unit.microbatch], operation, unit, strategy)
        if self._meeting is not None:
            seconds = self._meeting.longest(operation, seconds)
        return time.perf_counter() + self._scale * seconds

    def _rest(self, end: float) -> None:
        time.sleep(max(end - time.perf_counter(), 0.0))

    def forward(self, operation: Operation, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        end = self._begin(operation, unit, strategy)
        outputs = self._stages.forward(operation, unit, strategy, inputs)
        self._rest(end)
        return outputs

    def backward(self, operation: Operation, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        end = self._begin(operation, unit, strategy)
        results = self._stages.backward(operation, unit, strategy, gradients)
        self._rest(end)
        return results

    def weight(self, operation: Operation, unit: Unit, strategy: str) -> None:
        end = self._begin(operation, unit, strategy)
        self._stages.weight(operation, unit, strategy)
        self._rest(end)

    def reduce(self, module: str, segment: int) -> None:
        self._stages.reduce(module, segment)


@dataclass
class Account:
    """Of an iteration, on the main thread: ``began``, when its first action did (seconds of the host's clock), and what
    of a core went to its ``stages``: the executor, building what it needs, and what it runs."""

    began: float = 0.0
    stages: float = 0.0
    dies: bool = False
    """The process does, in the iteration's first backward here."""
    _prepared: float = 0.0

    def planned(self) -> None:
        """The plan is there; what follows serves its stages."""
        self._prepared = time.thread_time()

    def ran(self, began: float, between: float) -> None:
        """The last action is over; ``between`` seconds of a core went to work in the gaps."""
        self.began, self.stages = began, time.thread_time() - self._prepared - between


class AccountingClock(Clock):
    """A clock that sees, when it is set, that the plan of an iteration is there."""

    def __init__(self, device: torch.device, account: Account):
        super().__init__(device)
        self._account = account

    def begin(self) -> None:
        """See :class:`Clock`."""
        super().begin()
        self._account.planned()


class SleepingExecutor(Executor):
    """The executor, of which every operation sleeps once it is done until its price is over. Where replicas meet, that
    is the price of the longest once all are there."""

    def __init__(
        self, rank: int, transport: Transport, clock: Clock, prices: Prices, scale: float, account: Account,
        meeting: Meeting | None = None,
    ):  # fmt: skip
        super().__init__(rank, transport, clock)
        self._meeting = meeting
        self._prices, self._scale, self._account = prices, scale, account

    def run(
        self, plan: Plan, runner: OperationRunner, iteration: int = 0, meanwhile: Iterator[None] | None = None
    ) -> None:
        """See :class:`Executor`."""
        assert isinstance(runner, ChunkRunner)
        began, between = time.perf_counter(), 0.0

        def counted(steps: Iterator[None]) -> Iterator[None]:
            nonlocal between
            while True:
                before = time.thread_time()
                more = next(steps, self) is not self
                between += time.thread_time() - before
                if not more:
                    return
                yield

        steps = None if meanwhile is None else counted(meanwhile)
        sleeping = _Sleeping(runner, self._prices, self._scale, self._account.dies, self._meeting)
        super().run(plan, sleeping, iteration, steps)
        self._account.ran(began, between)
