"""Megatron's own pipeline schedules on this project's executor, for chunks that belong to no model family.

The interface is that of ``forward_backward_pipelining_with(out)_interleaving``: chunk v of rank r is stage
``v * ranks + r``, takes its input through ``set_input_tensor``, and is run by the script's ``forward_step``, each chunk
with a data iterator of its own. The order is Megatron's, as a plan. Upstream's unit tests of pipeline schedules run
against this function (``scripts/upstream_tests``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from ..core import ModalityModule, Operation, OperationGraph, Payload, Plan, TensorSpec, Unit
from ..core.lower import make_plan
from ..core.verify import verify
from ..megatron.call import ScheduleCall
from ..megatron.exchange import GlooExchange
from ..megatron.iteration import Iteration
from ..runtime.clock import Clock
from ..runtime.executor import Executor
from ..runtime.layer_context import LayerContext
from ..runtime.protocol import MicrobatchInputs, Tensors
from ..runtime.transport_choice import choose_transport
from ..schedulers.megatron import interleaved, one_forward_one_backward

_MODULE = "model"


class PlainChunks:
    """A model that is nothing but its chunks; see :class:`dip_megatron.runtime.protocol.RunnableChunks`."""

    def __init__(self, segments: int, ranks: int, forward_step_func: Callable[..., Any], iterators: list[Any]):
        """``iterators[v]`` is chunk v's data iterator, or None."""
        self.modules = (ModalityModule(_MODULE, ((1,) * ranks,) * segments),)
        self.mode = LayerContext()
        self._forward_step_func = forward_step_func
        self._iterators = iterators

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a chunk is called with."""
        return {"args": args, "kwargs": kwargs}

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: list[Tensors], microbatch: MicrobatchInputs
    ) -> Tensors:
        """A stage before the last, through the script's ``forward_step``."""
        _set_input(chunk, inputs)
        output, _ = self._forward_step_func(self._iterators[stage.segment], chunk)
        return {"hidden": output}

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """The last stage's forward."""
        _set_input(chunk, inputs)
        return chunk(*arguments["args"], **arguments["kwargs"])

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """All of it: every unit is a microbatch."""
        return 1.0


class PlainForwardBackward:
    """Callable with the interface of Megatron's pipelined ``forward_backward_*`` functions."""

    def __init__(self, timeout_seconds: float = 600.0):
        self._timeout = timeout_seconds
        self._executors: dict[tuple[int, ...], Executor] = {}
        self._reduced: WeakSet[torch.nn.Module] = WeakSet()

    def __call__(self, **arguments: Any) -> list[Any]:
        """Run one iteration; returns the losses on the last pipeline rank.

        Raises RuntimeError where Megatron's interleaved schedule does (a last group of microbatches smaller than the
        pipeline), ValueError for what has no fixed shapes or no pipeline.
        """
        call = ScheduleCall.parse(arguments)
        assert call.seq_length is not None
        assert call.micro_batch_size is not None
        chunks, data, num_microbatches = call.chunks, call.data_iterator, call.num_microbatches
        iterators = data if isinstance(data, list) else [data] * len(chunks)
        config = get_model_config(chunks[0])
        pipeline = _pipeline(call.p2p_communicator, call.pg_collection)
        if len(pipeline) < 2:
            raise ValueError("one pipeline rank has nothing to schedule; use Megatron's forward_backward_no_pipelining")
        if call.adjust_tensor_shapes_fn is not None or config.variable_seq_lengths:
            raise ValueError(
                "chunks of no model family exchange tensors of one shape: distillation and variable_seq_lengths need "
                "Megatron's own schedule"
            )
        group = getattr(config, "microbatch_group_size_per_vp_stage", None) or len(pipeline)
        if len(chunks) > 1 and 0 < num_microbatches % group < len(pipeline):
            raise RuntimeError(
                f"{num_microbatches} microbatches in groups of {group} on {len(pipeline)} pipeline ranks: the last "
                f"group is smaller than the pipeline; use a multiple of {group}"
            )
        length = call.seq_length
        if call.decoder_seq_length is not None and len(chunks) == 1:
            length = call.decoder_seq_length
        context, tensor = _sizes(call.pg_collection)
        length = length // context // (tensor if config.sequence_parallel else 1)
        dtype = str(config.pipeline_dtype or config.params_dtype).removeprefix("torch.")
        hidden = TensorSpec("hidden", (length, call.micro_batch_size, config.hidden_size), dtype)
        plan = _plan(len(pipeline), len(chunks), num_microbatches, group, call.forward_only, (hidden,))
        executor = self._executor(pipeline)

        def last_forward_step(_: Any, last: torch.nn.Module) -> Any:
            return call.forward_step_func(iterators[-1], last)

        stages = PlainChunks(len(chunks), len(pipeline), call.forward_step_func, iterators)
        iteration = Iteration(
            stages, executor, plan, replace(call, forward_step_func=last_forward_step),
            [MicrobatchInputs({}) for _ in range(num_microbatches)], context_parallel_size=context,
            reduced=self._reduced,
        )  # fmt: skip
        iteration.run()
        if not call.forward_only:
            iteration.finalize()
        return iteration.losses

    def _executor(self, pipeline: list[int]) -> Executor:
        """The executor among these ranks; its channels stay."""
        known = self._executors.get(tuple(pipeline))
        rank = pipeline.index(dist.get_rank())
        if known is None:
            device = torch.device("cpu")
            if torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
            exchange = GlooExchange(pipeline, self._timeout)
            known = Executor(rank, choose_transport(pipeline, rank, device, self._timeout, exchange), Clock(device))
            self._executors[tuple(pipeline)] = known
        return known


def _pipeline(p2p_communicator: Any, pg_collection: Any) -> list[int]:
    """Global ranks of the pipeline, from whatever names it."""
    if p2p_communicator is not None:
        group = p2p_communicator.pp_group
    else:
        group = getattr(pg_collection, "pp", None) or parallel_state.get_pipeline_model_parallel_group()
    return list(dist.get_process_group_ranks(group))


def _sizes(pg_collection: Any) -> tuple[int, int]:
    """Context- and tensor-parallel size."""
    context, tensor = getattr(pg_collection, "cp", None), getattr(pg_collection, "tp", None)
    return (
        parallel_state.get_context_parallel_world_size() if context is None else dist.get_world_size(context),
        parallel_state.get_tensor_model_parallel_world_size() if tensor is None else dist.get_world_size(tensor),
    )


def _set_input(chunk: torch.nn.Module, inputs: list[Tensors]) -> None:
    get_attr_wrapped_model(chunk, "set_input_tensor")([inputs[0]["hidden"] if inputs else None])


@lru_cache(maxsize=32)
def _plan(ranks: int, segments: int, microbatches: int, group: int, forward_only: bool, payload: Payload) -> Plan:
    """Megatron's order for stages of equal length, checked; every message carries ``payload``."""
    trainable = ((False,) * ranks,) * segments if forward_only else ()
    module = ModalityModule(_MODULE, ((1,) * ranks,) * segments, trainable=trainable)
    virtual_microbatches = microbatches * segments
    second = np.ones((1, virtual_microbatches, ranks))
    graph = OperationGraph(
        ranks=ranks,
        modules=(module,),
        units=tuple(Unit(m, _MODULE, m) for m in range(microbatches)),
        forward=second,
        backward=second,
        weight=second,
        fused=2 * second,
        activation=second,
        deferred_activation=0 * second,
        transfer=np.zeros(virtual_microbatches),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, np.inf),
    )
    schedule = one_forward_one_backward(graph) if segments == 1 else interleaved(graph, group)
    carried = [(s, t) for s in range(virtual_microbatches) for t in (s, *graph.next_virtual_microbatches[s])]
    payloads: dict[tuple[int, ...], Payload] = dict.fromkeys(carried, payload)
    plan = make_plan(graph, schedule, lower_bound=0.0, name="megatron", payloads=payloads)
    verify(plan)
    return plan
