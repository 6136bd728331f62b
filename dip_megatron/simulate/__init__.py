"""Time and memory of a schedule."""

from .reference import DeadlockError, Timeline, simulate

__all__ = ["DeadlockError", "Timeline", "simulate"]
