"""Megatron-Core's own step: losses with their scales, timers, and ranges for profilers. Looked up at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import nvtx_range_pop, nvtx_range_push

from .names import Name, Topic

TOPIC = Topic(
    "losses as Megatron computes and scales them",
    "megatron-core",
    "0.16.1, 0.19.2",
    "no iteration can run under DIP; use --dip-schedule off",
    (
        Name(
            "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
            ("model", "output_tensor", "loss_func", "config", "vp_stage", "collect_non_loss_data", "num_microbatches",
             "forward_data_store", "cp_group_size", "is_last_stage"),
        ),
        Name("megatron.core.timers:Timers", has=("_log_level",)),
        Name("megatron.core.utils:nvtx_range_push", ("*", "suffix")),
        Name("megatron.core.utils:nvtx_range_pop", ("*", "suffix")),
    ),
)  # fmt: skip


def calculate_loss(*arguments: Any) -> tuple[Any, Any]:
    """Megatron's ``forward_step_calc_loss``: the output (the scaled loss) and the number of tokens."""
    result = schedules.forward_step_calc_loss(*arguments)
    return result[0], result[1]


def time_no_stages(timers: Any) -> None:
    """Let Megatron's timers time nothing within an iteration but the iteration. Each stops the device until all it was
    given has ended, receives too that were posted ahead: two ranks that stop so in the middle of their stages, before
    they send, would wait for each other for good. Timers of a loop's own are left alone."""
    if hasattr(timers, "_log_level"):
        timers._log_level = min(timers._log_level, 1)


@contextlib.contextmanager
def profiled(name: str) -> Iterator[None]:
    """A range that profilers show, if Megatron was told to mark them."""
    nvtx_range_push(suffix=name)
    try:
        yield
    finally:
        nvtx_range_pop(suffix=name)
