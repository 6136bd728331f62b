"""Time and memory of a schedule."""

from .kernels import GraphArrays, fit_in_memory, graph_arrays, peak_memory, simulate_compiled, simulate_set_compiled
from .memory import MemoryLine, memory_over_time
from .reference import DeadlockError, SetTimeline, Timeline, idle_share, simulate, simulate_set

__all__ = [
    "DeadlockError",
    "GraphArrays",
    "MemoryLine",
    "SetTimeline",
    "Timeline",
    "fit_in_memory",
    "graph_arrays",
    "idle_share",
    "memory_over_time",
    "peak_memory",
    "simulate",
    "simulate_compiled",
    "simulate_set",
    "simulate_set_compiled",
]
