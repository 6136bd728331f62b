"""Runs Megatron-LM's unit tests of pipeline schedules behind DIP's hook: on Megatron's own functions (DIP off), or with
DIP's forward-backward function in their place (``DIP_UPSTREAM_FUNCTION=dip``).

Loaded into pytest by ``scripts/upstream_tests``, on every rank. Without a GPU, Megatron runs on the CPU platform, and
the tests' process groups are gloo's instead of NCCL's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dip_megatron.megatron.cpu import install_cpu_platform

ON_CPU = install_cpu_platform()
if ON_CPU:
    _init_process_group = torch.distributed.init_process_group

    def _over_gloo(backend: str | None = None, **kwargs: Any) -> None:
        _init_process_group("gloo" if backend == "nccl" else backend, **kwargs)

    torch.distributed.init_process_group = _over_gloo

from megatron.core.pipeline_parallel import schedules  # noqa: E402  (after the platform)

import dip_megatron  # noqa: E402
from dip_megatron.megatron.marks import MARK  # noqa: E402
from dip_megatron.testing.plain import PlainForwardBackward  # noqa: E402

NAMES = ("forward_backward_pipelining_with_interleaving", "forward_backward_pipelining_without_interleaving")
DIP = PlainForwardBackward(timeout_seconds=120.0) if os.environ["DIP_UPSTREAM_FUNCTION"] == "dip" else None
CALLS = 0


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(**kwargs: Any) -> Any:
        global CALLS
        CALLS += 1
        return function(**kwargs)

    return counted


for _name in NAMES:
    setattr(schedules, _name, _counted(DIP or getattr(schedules, _name)))

dip_megatron.install()  # the tests' look-ups pass through DIP's hook
assert hasattr(schedules.get_forward_backward_func, MARK), "DIP's hook is not in place"

_CALLS_BEFORE = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Count the calls of the function."""
    before = CALLS
    try:
        return (yield)
    finally:
        item.stash[_CALLS_BEFORE] = CALLS - before


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test on the first rank's file of results."""
    if os.environ.get("RANK", "0") == "0" and (report.when == "call" or report.outcome != "passed"):
        calls = dict(report.user_properties).get("calls", 0)
        with Path(os.environ["DIP_UPSTREAM_RESULTS"]).open("a") as results:
            results.write(f"{report.outcome}\t{calls}\t{report.nodeid.rpartition('::')[2]}\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Put them into the report."""
    report = yield
    report.user_properties.append(("calls", item.stash.get(_CALLS_BEFORE, 0)))
    return report
