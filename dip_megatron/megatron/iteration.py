"""One iteration of a rank's chunks under its plan: from microbatches and a plan to gradients ready for the optimizer.

Whoever executes plans comes here: the training loop, Megatron's own orders on chunks of no family, benchmarks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.utils import get_model_config

from ..compat.token_counts import TokenCounts
from ..core import Plan
from ..runtime.chunk_runner import ChunkRunner, IterationState, OperationLookAhead
from ..runtime.executor import Executor
from ..runtime.protocol import MicrobatchInputs, RunnableChunks
from .call import ScheduleCall
from .copies import copied, sum_gradients
from .gradients import GradientSynchronization
from .parameters import ParameterSynchronization
from .step import MegatronStep


class Iteration:
    """Built, run once, finalized if it trains. Building does all that needs no other rank."""

    def __init__(
        self,
        program: RunnableChunks,
        executor: Executor,
        plan: Plan,
        call: ScheduleCall,
        microbatches: list[MicrobatchInputs],
        *,
        context_parallel_size: int = 1,
        counts: TokenCounts | None = None,
        reduced: WeakSet[torch.nn.Module] | None = None,
    ):
        """``plan`` has passed the verifier and is of these ``microbatches``, of which a replica may have more or fewer
        than the ``call`` has in the mean; the call's chunks are wrapped, in the program's order. ``counts``: the loop's
        of tokens (None: Megatron's); ``reduced``: the chunks whose gradients have been reduced before, to be kept from
        one iteration to the next (None: no chunk's have)."""
        chunks, forward_only = call.chunks, call.forward_only
        config = get_model_config(chunks[0])
        graph, rank = plan.graph, executor.position.rank
        self._program, self._executor, self._plan, self._chunks = program, executor, plan, chunks
        self._config, self._call = config, call
        self._step = MegatronStep(
            config, call.forward_step_func, num_microbatches=len(microbatches), averaged_over=call.num_microbatches,
            counts=counts, context_parallel_size=context_parallel_size,
            collect_non_loss_data=call.collect_non_loss_data,
        )  # fmt: skip
        places = [(m.name, k) for m in program.modules for k in range(m.segments)]
        remaining = dict.fromkeys(places, 0)
        if not forward_only:
            for virtual_microbatch in range(graph.virtual_microbatches):
                if graph.has_weight[virtual_microbatch, rank]:
                    remaining[
                        graph.units[int(graph.unit_of[virtual_microbatch])].module, graph.segment(virtual_microbatch)
                    ] += 1
        self._copies = [chunks[i] for i in copied(program.modules)]
        self._loss_rank: int = getattr(program, "loss_rank", graph.ranks - 1)
        self._handed: list[Any] | None = None
        self._idle = {i for i, place in enumerate(places) if not remaining[place]}
        state = IterationState(microbatches, forward_only, remaining={p: n for p, n in remaining.items() if n})
        order = list(reversed(range(len(chunks))))
        self._sync = GradientSynchronization(plan, chunks, config, order, WeakSet() if reduced is None else reduced)
        self._stages = ChunkRunner(
            program, chunks, self._step, state, last_rank=self._loss_rank,
            look_ahead=OperationLookAhead.of(plan, rank), on_chunk_done=self._sync.chunk_done,
            on_reduce=self._sync.reduce,
        )  # fmt: skip

    @property
    def losses(self) -> list[Any]:
        """What the loss functions reported, in the order of microbatches; empty but on the loss's rank, and on the last
        one after :meth:`hand_over`."""
        return self._step.forward_data_store if self._handed is None else self._handed

    def hand_over(self, gather: Callable[[bytes], list[bytes]]) -> None:
        """Bring losses and the number of tokens to the pipeline's last rank, where Megatron looks for them, if the
        loss is computed on another one. ``gather`` is among the pipeline's ranks, which all call it."""
        rank, last = self._executor.position.rank, self._plan.graph.ranks - 1
        if self._loss_rank == last:
            return
        mine = b""
        if rank == self._loss_rank:
            mine = pickle.dumps(_moved((self.losses, self._step.total_num_tokens), torch.device("cpu")))
        found = gather(mine)[self._loss_rank]
        if rank == last:
            device = next(p for chunk in self._chunks for p in chunk.parameters()).device
            self._handed, self._step.total_num_tokens = _moved(pickle.loads(found), device)

    def run(self, number: int = 0, meanwhile: Iterator[None] | None = None) -> None:
        """Execute the plan. ``number`` is the loop's, for messages; ``meanwhile`` see :meth:`Executor.run`. Where
        weights may have changed layers forget what they keep of them (low-precision copies)."""
        if self._call.weights_changed:
            for chunk in self._chunks:
                if hasattr(chunk, "set_is_first_microbatch"):
                    chunk.set_is_first_microbatch()
        if self._call.forward_only:
            with torch.no_grad():
                self._executor.run(self._plan, self._stages, number)
            return
        parameters = ParameterSynchronization(self._chunks)
        parameters.begin()
        self._sync.begin(self._idle)
        self._executor.run(self._plan, self._stages, number, meanwhile)
        self._sync.end()
        parameters.end()

    def finalize(self) -> None:
        """Megatron's end of an iteration: gradients reduced over replicas, shared embeddings added up, losses scaled by
        tokens; nothing where the chunks' config has no function for it. Then those of modules that stand on every rank
        are summed."""
        if self._config.finalize_model_grads_func is not None:
            self._finalize()
        if self._copies:
            sum_gradients(self._copies)

    def _finalize(self) -> None:
        config, chunks, call = self._config, self._chunks, self._call
        tokens = self._step.total_num_tokens
        if tokens is None:
            parameter = next(p for chunk in chunks for p in chunk.parameters())  # a chunk may have no layers
            tokens = torch.zeros([], dtype=torch.int, device=parameter.device)
        # Megatron looks for the embedding on the first rank's first chunk and for the head on the last rank's last one.
        ordered = chunks
        if self._executor.position.rank == 0:
            language = len(chunks) - self._program.modules[-1].segments
            ordered = [chunks[language], *chunks[:language], *chunks[language + 1 :]]
        config.finalize_model_grads_func(
            ordered, tokens if config.calculate_per_token_loss else None, pg_collection=call.pg_collection,
            **({"force_all_reduce": True} if call.force_all_reduce else {}),
        )  # fmt: skip


def _moved(data: Any, device: torch.device) -> Any:
    """Lists, tuples and dicts of tensors, on another device."""
    if isinstance(data, torch.Tensor):
        return data.detach().to(device)
    if isinstance(data, dict):
        return {name: _moved(value, device) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_moved(value, device) for value in data)
    return data
