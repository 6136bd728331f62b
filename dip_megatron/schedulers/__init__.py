"""The schedules DIP is measured against, as plans through the same simulator and verifier."""

from .common import BaselineError
from .entry import Effort, Found, LeastRecompute, MixedChunks, Problem, ScheduleEntry
from .fit import Fitted, least_recompute, least_recompute_by_module
from .mean import mean_graph
from .megatron import interleaved, legal_group, one_forward_one_backward
from .optimus import optimus_coarse, optimus_leads
from .registry import UnknownScheduleError, find_schedule, register_schedule, schedule_names
from .segmented import segmented_static
from .static import StaticChoice, given_choice, static_graph, static_plan, tune_static
from .static_partition import (
    chain,
    item_parameters,
    item_seconds,
    latency_balanced,
    least_maximum,
    parameter_balanced,
)
from .zero_bubble import zb_h1, zb_v

__all__ = [
    "BaselineError",
    "Effort",
    "Fitted",
    "Found",
    "LeastRecompute",
    "MixedChunks",
    "Problem",
    "ScheduleEntry",
    "StaticChoice",
    "UnknownScheduleError",
    "chain",
    "find_schedule",
    "given_choice",
    "interleaved",
    "item_parameters",
    "item_seconds",
    "latency_balanced",
    "least_maximum",
    "least_recompute",
    "least_recompute_by_module",
    "legal_group",
    "mean_graph",
    "one_forward_one_backward",
    "optimus_coarse",
    "optimus_leads",
    "parameter_balanced",
    "register_schedule",
    "schedule_names",
    "segmented_static",
    "static_graph",
    "static_plan",
    "tune_static",
    "zb_h1",
    "zb_v",
]
