"""Where a data loader stood after the microbatches that are trained on, while more have been read."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any


class LoaderState:
    """What a checkpoint is to hold of a loader that saves its own state (Energon's), as both loops ask it for it."""

    def __init__(self) -> None:
        self._kept: bytes | None = None  # pickled, as loaders may hand out what they go on to change

    def keep(self, data_iterator: Any) -> None:
        """Before more is read of it (None: nothing is, or nothing saves the state); on the ranks that save it."""
        from megatron.core import parallel_state

        self._kept = None
        loader: Any = getattr(data_iterator, "iterable", None)
        saves = parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        if saves and hasattr(loader, "save_state"):
            self._kept = pickle.dumps(loader.save_state())

    def of(self, data_iterator: Any) -> Any:
        """What to save instead of ``data_iterator``, whose loader has gone on to what is read ahead, if it has."""
        kept = self._kept
        if kept is None:
            return data_iterator
        return SimpleNamespace(iterable=SimpleNamespace(save_state=lambda: pickle.loads(kept)))
