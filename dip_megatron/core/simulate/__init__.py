"""Time and memory of a schedule."""

from .kernels import GraphArrays, graph_arrays, peak_memory, simulate_compiled
from .memory import MemoryLine, memory_over_time
from .reference import DeadlockError, Timeline, idle_share, simulate

__all__ = [
    "DeadlockError",
    "GraphArrays",
    "MemoryLine",
    "Timeline",
    "graph_arrays",
    "idle_share",
    "memory_over_time",
    "peak_memory",
    "simulate",
    "simulate_compiled",
]
