"""Megatron's rerun state machine under a plan.

It repeats an iteration whose losses or gradients look wrong, to tell a faulty GPU from a faulty model: at once, and
again after a restart on other hardware. Its data iterators are rewound for that, but what they would replay is the
batch that was read ahead. So the iteration's own microbatches and plan are kept here, and used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..compat import rerun
from ..planner.delivery import DeliveredPlan
from ..runtime.protocol import MicrobatchInputs


class Repetition:
    """What an iteration ran, for as long as Megatron may ask for it again."""

    def __init__(self) -> None:
        self._kept: tuple[list[MicrobatchInputs], DeliveredPlan] | None = None

    def again(self) -> tuple[list[MicrobatchInputs], DeliveredPlan] | None:
        """The microbatches and the plan to repeat, if the state machine has asked for that."""
        if not rerun.repeats():
            return None
        if self._kept is None:
            raise RuntimeError("Megatron asks for an iteration again that DIP has not run")
        return self._kept

    def keep(self, microbatches: list[MicrobatchInputs], delivered: DeliveredPlan) -> None:
        """About to run these: called after all reading, right before the first stage."""
        if rerun.watches():
            self._kept = (microbatches, delivered)
            # Repetitions read nothing: random numbers must start where the stages began, not where reading did.
            rerun.begin_here()


@contextmanager
def counted_as(microbatch: int, num_microbatches: int) -> Iterator[None]:
    """Within, results that the script's loss function validates are numbered as if microbatches ran in their order.

    A result is found again by its number when an iteration is repeated from a checkpoint, where the plan may differ.
    """
    with rerun.counting_in(_Counts(microbatch, num_microbatches)):
        yield


class _Counts(dict[Any, int]):
    """A caller's k-th call (from 0) within microbatch m of n gets the number k * n + m + 1: Megatron's own, where loss
    functions validate a result once."""

    def __init__(self, microbatch: int, num_microbatches: int):
        self._first = microbatch
        self._step = num_microbatches

    def __missing__(self, caller: Any) -> int:
        return self._first

    def __setitem__(self, caller: Any, count: int) -> None:
        super().__setitem__(caller, self[caller] + self._step if caller in self else count)
