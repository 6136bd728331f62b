"""Finding schedules: list scheduling by keys, annealing, local search, and the paper's three phases."""

from .engine import search, warm_up
from .feasibility import DoesNotFitError
from .options import SearchOptions, SearchResult

__all__ = ["DoesNotFitError", "SearchOptions", "SearchResult", "search", "warm_up"]
