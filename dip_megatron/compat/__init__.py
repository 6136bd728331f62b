"""What DIP leans on in Megatron-Core, Transformer Engine, Megatron-Bridge, ms-swift, ROLL and torch that they don't
promise: one file a topic.

A new release of one of them is a matter of this folder alone. Each file says which releases it was seen with.
"""

from __future__ import annotations

import importlib

from .names import Topic

FILES = (
    "losses", "linears", "recompute", "layer_specs", "experts", "buckets", "rerun", "llava", "ranks_on_one_gpu", "host",
    "training_loop", "checkpointing", "transformer_engine", "process_groups", "tensors", "bridge", "bridge_building",
    "lone_rank", "mcore_bridge", "ms_swift", "mimo", "averages", "mcore_adapter",
    "roll", "token_counts",
)  # fmt: skip


def topics() -> list[Topic]:
    """All topics. Raises ImportError where a file can't be loaded with what is installed."""
    return [topic for file in FILES for topic in topics_of(file)]


def topics_of(file: str) -> list[Topic]:
    """The topics of one file of this package. Raises ImportError if it can't be loaded with what is installed."""
    module = importlib.import_module(f"{__name__}.{file}")
    return [value for value in vars(module).values() if isinstance(value, Topic)]
