"""Megatron-Core's rerun state machine, which repeats an iteration to tell a faulty GPU from a faulty model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

from .names import Name, Topic

TOPIC = Topic(
    "iterations that Megatron repeats (--rerun-mode)",
    "megatron-core",
    "0.16.1, 0.19.2",
    "a repeated iteration isn't the same; use --rerun-mode disabled",
    (
        Name("megatron.core.rerun_state_machine:RerunStateMachine", has=("state", "validation_counts")),
        Name("megatron.core.rerun_state_machine:RerunStateMachine._save_state", ()),
        Name("megatron.core.rerun_state_machine:RerunStateMachine.get_mode", ()),
        Name("megatron.core.rerun_state_machine:RerunState.INITIAL_RUN"),
        Name("megatron.core.rerun_state_machine:RerunState.RERUNNING_IN_PLACE"),
    ),
)


def watches() -> bool:
    """Whether iterations may have to be repeated at all."""
    return get_rerun_state_machine().get_mode() is not RerunMode.DISABLED


def repeats() -> bool:
    """Whether this iteration is the last one once more."""
    return get_rerun_state_machine().state is RerunState.RERUNNING_IN_PLACE


def begin_here() -> None:
    """In an iteration's first run: have its repetitions start with the random numbers of this moment."""
    machine = get_rerun_state_machine()
    if machine.state is RerunState.INITIAL_RUN:
        machine._save_state()


@contextmanager
def counting_in(counts: dict[Any, int]) -> Iterator[None]:
    """Within, results that are validated take their numbers from ``counts``."""
    machine = get_rerun_state_machine()
    before = machine.validation_counts
    machine.validation_counts = counts
    try:
        yield
    finally:
        machine.validation_counts = before
