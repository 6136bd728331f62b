"""A loop that no adapter knows: it builds its model through DIP and calls Megatron-Core's schedule as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from ...describe.model import Parallel
from .loop import LoopSettings, TrainingLoop


class GenericLoop(TrainingLoop):
    """Parallel sizes as Megatron-Core has them; the rest as told."""

    def __init__(self, *, another_follows: Callable[[], bool] | None = None, sequence_parallel: bool = False,
                 distributed_optimizer: bool = False, **settings: Any):  # fmt: skip
        """``settings`` are fields of :class:`LoopSettings`."""
        parallel = Parallel(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_data_parallel_world_size(), sequence_parallel, distributed_optimizer,
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )  # fmt: skip
        super().__init__(LoopSettings(parallel, **settings))
        self._another_follows = another_follows

    def another_follows(self) -> bool:
        return self._another_follows is None or self._another_follows()
