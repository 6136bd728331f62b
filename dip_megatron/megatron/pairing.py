"""Pairing alone: under Megatron's own schedule each replica gives its microbatches longest first.

Replicas that share experts wait for one another in every slot of their common schedule. With the k-th longest of each
in slot k they wait least, and nothing but the order of sums changes. What a microbatch takes is priced as for plans;
the model is Megatron's, built as ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from ..config import DipConfig
from ..describe.cost import load_cluster
from ..describe.model import even_partition
from ..families.family import ModelFamily
from ..planner.balance import microbatch_work
from ..planner.model_graphs import ModelGraphs
from ..runtime.chunk_runner import ModelStandIn
from ..runtime.protocol import MicrobatchInputs, ModelProgram
from ..schedulers.joint import dip_pairing
from .adapters.loop import TrainingLoop
from .build import record_blueprint
from .call import ScheduleCall, as_list
from .device import cluster_here
from .exchange import GlooExchange
from .lookahead import capture_microbatch
from .ranks import replica_ranks


class Pairing:
    """The order of one run's microbatches, the same on all ranks of a replica."""

    def __init__(self, loop: TrainingLoop, config: DipConfig, families: Sequence[ModelFamily]):
        """``families`` are the models to look for."""
        self._loop, self._config, self._families = loop, config, families
        self._own: dict[int, torch.nn.Module] = {}
        self._program: ModelProgram | None = None
        self._graphs: ModelGraphs | None = None
        self._exchange: GlooExchange | None = None

    def noting(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """``provider``, of whose model it is known what it is. Calling it raises ConfigurationError for a model of no
        known family, of which no microbatch could be priced."""

        def provide(*args: Any, **kwargs: Any) -> Any:
            if self._program is None:
                self._learn(provider, *args, **kwargs)
            model = provider(*args, **kwargs)
            self._own |= {id(chunk): chunk for chunk in as_list(model)}
            return model

        return provide

    def _learn(self, provider: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        family, blueprint = record_blueprint(self._families, provider, *args, **kwargs)
        model = family.describe(blueprint, self._loop.settings.parallel)
        partition = even_partition(model)
        named, micro_batch_size = self._config.cluster, self._loop.settings.micro_batch_size
        self._graphs = ModelGraphs(model, cluster_here() if named == "auto" else load_cluster(named), partition)
        self._program = family.program(
            blueprint, {m.module: m.layers for m in partition.modules},
            rank=parallel_state.get_pipeline_model_parallel_rank(), micro_batch_size=micro_batch_size,
        )  # fmt: skip
        self._exchange = GlooExchange(replica_ranks(), self._config.timeout_seconds)

    def owns(self, model: Any) -> bool:
        """Whether ``model``, as a schedule is given it, was built by a provider that was noted."""
        return any(self._built(chunk) is not None for chunk in as_list(model))

    def _built(self, chunk: Any) -> Any:
        while chunk is not None and id(chunk) not in self._own:
            chunk = getattr(chunk, "module", None)  # within Megatron's wrappers
        return chunk

    def ordered(self, call: ScheduleCall) -> Any:
        """Data iterators for the call of a schedule, which give its microbatches longest first. All ranks of the
        replica call it together. Evaluations keep theirs."""
        given = call.data_iterator
        if call.forward_only or call.num_microbatches < 2:
            return given
        each = given if isinstance(given, list) else [given] * len(call.chunks)
        read = [
            [self._capture(call.forward_step_func, iterator, chunk) for _ in range(call.num_microbatches)]
            for iterator, chunk in zip(each, call.chunks, strict=True)
        ]
        order = self._agreed(read[0])
        paired = [
            None if iterator is None else _replayed([line[m] for m in order])
            for iterator, line in zip(each, read, strict=True)
        ]
        return paired if isinstance(given, list) else paired[0]

    def _capture(self, step: Callable[..., Any], iterator: Any, chunk: torch.nn.Module) -> MicrobatchInputs:
        assert self._program is not None
        return capture_microbatch(step, iterator, chunk, self._program, _VirtualStage)

    def _agreed(self, microbatches: Sequence[MicrobatchInputs]) -> list[int]:
        """The first rank prices them: others may have been given less of the batch."""
        assert self._exchange is not None
        told = None
        if self._exchange.rank == 0:
            try:
                told = pickle.dumps(self._order(microbatches))
            except Exception as error:  # all ranks must learn of it, or they would wait for the broadcast
                told = pickle.dumps(f"{type(error).__name__}: {error}")
        answer: list[int] | str = pickle.loads(self._exchange.broadcast(told))
        if isinstance(answer, str):
            raise RuntimeError(f"--dip-pairing can't price the microbatches: {answer}")
        return answer

    def _order(self, microbatches: Sequence[MicrobatchInputs]) -> list[int]:
        assert self._program is not None
        assert self._graphs is not None
        loads = tuple(self._program.load(m) for m in microbatches)
        seconds = np.asarray(microbatch_work(self._graphs.build(loads, False))[0])
        return [int(m) for m in dip_pairing(seconds)]


class _VirtualStage(ModelStandIn):
    """A chunk under Megatron's own schedules, which knows its virtual stage."""

    @property
    def vp_stage(self) -> Any:  # type: ignore[override]
        chunk = self._chunk
        while not hasattr(chunk, "vp_stage") and hasattr(chunk, "module"):
            chunk = chunk.module
        return getattr(chunk, "vp_stage", None)


def _replayed(microbatches: Sequence[MicrobatchInputs]) -> Iterator[Any]:
    """What was read for these microbatches, in their order."""
    return iter([item for microbatch in microbatches for item in microbatch.items or ()])
