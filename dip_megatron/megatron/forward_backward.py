"""The forward-backward function that Megatron's train loop gets instead of its own schedule.

Per iteration: take the microbatches read ahead and their plan (made meanwhile, equal on all ranks), run the plan and in
its gaps read and submit the next iteration's, finalize gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..compat.losses import time_no_stages
from ..compat.token_counts import TokenCounts
from ..core import Plan
from ..core.protocols import Exchange
from ..planner.delivery import DeliveredPlan, PlanDelivery
from ..planner.exchange_agreement import ExchangeReport
from ..planner.recalibration import Measurement
from ..planner.request import PlanRequest
from ..report.iterations import IterationReport
from ..runtime.clock import Clock, MeasuredSpan
from ..runtime.executor import Executor
from ..runtime.protocol import MicrobatchInputs, ModelProgram
from ..runtime.trained import Names
from ..runtime.watch import Watchdog
from .agreement import TrainingAgreement, TrainingConsumer
from .call import ScheduleCall
from .durations import Durations
from .iteration import Iteration
from .lookahead import LookAhead, RawItems, capture_microbatch
from .replicas import ExchangesAhead
from .rerun import Repetition

IterationConsumer = Callable[[IterationReport, Plan, list[MeasuredSpan]], object]
"""Is told of every training iteration, on all ranks."""


@dataclass
class PlanningPolicy:
    """How long to plan. ``budget_seconds`` None: as long as the running iteration leaves."""

    budget_seconds: float | None = None
    look_ahead: Callable[[], bool] = lambda: True
    """Whether the training iteration that is about to run is followed by another."""
    before_reading: Callable[[Any], object] = lambda _: None
    """Takes the iterator that the next iteration's microbatches are about to be read from; None if none are."""

    at_call_seconds: float = 0.0
    """From asking for the plan of an iteration, when the schedule is called with it, to the end of the search; 0: there
    is none."""

    def budget(self, seconds_left: float) -> float:
        """Seconds of search for the next plan, so many before this iteration is expected to end; the rest is for
        lowering, checking and broadcasting, which take tens of milliseconds."""
        if self.budget_seconds is not None:
            return self.budget_seconds
        return max(0.02, 0.6 * (seconds_left - 0.03))


class DipForwardBackward:
    """Runs the calls of Megatron's schedule; state of all iterations."""

    def __init__(
        self,
        program: ModelProgram,
        executor: Executor,
        delivery: PlanDelivery,
        clock: Clock,
        *,
        policy: PlanningPolicy | None = None,
        iteration: Callable[[], int | None] = lambda: None,
        watchdog: Watchdog | None = None,
        on_iteration: IterationConsumer | None = None,
        tensor_parallel: Exchange | None = None,
        pipeline: Exchange | None = None,
        peers: Exchange | None = None,
        on_training: TrainingConsumer | None = None,
        exchanges: ExchangesAhead | None = None,
        built: Sequence[Names] | None = None,
        counts: TokenCounts | None = None,
    ):
        """``iteration()`` see :meth:`.adapters.loop.TrainingLoop.iteration`. ``tensor_parallel`` is among the ranks
        that read the data together, if they are several; ``pipeline`` among the pipeline's, which hand over losses that
        the last one doesn't compute; ``peers``, ``on_training`` and ``built`` see :class:`TrainingAgreement`;
        ``exchanges`` are between the replicas; ``counts`` are the loop's of tokens (None: Megatron's)."""
        self._program = program
        self._executor = executor
        self._delivery = delivery
        self._clock = clock
        self._policy = policy or PlanningPolicy()
        self._watchdog = watchdog
        self._on_iteration = on_iteration
        self._trained = 0
        self._counted_by_loop = iteration
        self._requests = 0
        self._tensor_parallel = tensor_parallel
        self._pipeline = pipeline
        self._exchanges = exchanges
        self._exchanged: ExchangeReport | None = None
        # By iterator and by forward_only: ranks without data have None for the iterators of training and evaluation.
        self._look_ahead: dict[tuple[int, bool], tuple[Any, LookAhead]] = {}
        # The request of what has been read ahead, how many microbatches that is, and those that replaced them.
        self._next_request: dict[tuple[int, bool], tuple[int, int, list[MicrobatchInputs] | None]] = {}
        self._agreement = TrainingAgreement(
            program, executor.position.rank, delivery, peers=peers, on_change=on_training, built=built
        )
        self._repetition = Repetition()
        self._durations = Durations()
        self._counts = counts or TokenCounts()
        self._reduced: WeakSet[torch.nn.Module] = WeakSet()
        self._ended: float | None = None  # the last operation of the iteration before, if that trained

    def __call__(self, call: ScheduleCall) -> list[Any]:
        """Run one iteration; returns the losses on the last pipeline rank, as Megatron's schedules do. What only they
        need of the call (see :func:`.call.check_call`) is not looked at here."""
        try:
            return self._iterate(call)
        except StopIteration:
            raise
        except Exception as error:
            if self._watchdog is not None:
                self._watchdog.report(error)
            raise

    def read_ahead_of(self, iterators: Sequence[Any]) -> int:
        """How many microbatches have been read ahead of these data iterators, and wait for an iteration of this
        model."""
        read = [known for at, known in self._look_ahead.values() if at is not None and any(at is i for i in iterators)]
        return sum(known.waiting for known in read)

    def _number(self) -> int:
        """The number of the iteration that runs, or ran last."""
        number = self._counted_by_loop()
        return self._trained if number is None else number

    # -- one iteration -------------------------------------------------------------------------------------------
    def _iterate(self, call: ScheduleCall) -> list[Any]:
        chunks, forward_only, num_microbatches = call.chunks, call.forward_only, call.num_microbatches
        iterator = call.iterator
        config = get_model_config(chunks[0])
        if config.timers is not None:
            if torch.cuda.is_available():
                time_no_stages(config.timers)
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        repeated = None if forward_only else self._repetition.again()
        following: Iterator[None] = iter(())
        if not forward_only and repeated is None:
            self._trained += 1
        number = self._number()
        if repeated is not None:
            microbatches, delivered = repeated
        else:
            key = (id(iterator), forward_only)
            source = self._source(key, iterator, call.forward_step_func, chunks)
            microbatches, delivered = self._read(key, source, num_microbatches, chunks)
            if not forward_only:
                self._repetition.keep(microbatches, delivered)
                ahead = self._policy.look_ahead()
                self._policy.before_reading(iterator if ahead else None)
                if ahead:
                    following = self._read_ahead(key, source, num_microbatches, time.perf_counter())
        self._clock.begin()
        outside = None if self._ended is None else time.perf_counter() - self._ended
        iteration = Iteration(
            self._program, self._executor, delivered.plan, call, microbatches,
            context_parallel_size=parallel_state.get_context_parallel_world_size(), counts=self._counts,
            reduced=self._reduced,
        )  # fmt: skip
        iteration.run(number, following)
        if self._pipeline is not None:
            iteration.hand_over(self._pipeline.gather)
        spans = self._clock.spans()
        self._ended = None if forward_only else time.perf_counter()
        seconds = max((span.end for span in spans), default=0.0)
        if not forward_only:
            self._durations.add(seconds)
            self._delivery.measured(Measurement.of(delivered.request, self._executor.position.rank, spans))
            iteration.finalize()
        if config.timers is not None:
            config.timers("forward-backward").stop()
        if self._on_iteration is not None and not forward_only:
            report = IterationReport.of(number, delivered, spans, outside, self._exchanged)
            self._on_iteration(report, delivered.plan, spans)
        return iteration.losses

    def _read(
        self, key: tuple[int, bool], source: LookAhead, count: int, chunks: list[torch.nn.Module]
    ) -> tuple[list[MicrobatchInputs], DeliveredPlan]:
        """This iteration's microbatches and plan."""
        self._settle(key[1])
        request, planned, moved = self._next_request.pop(key, (None, count, None))
        if request is not None and planned != count:
            # Planned for another number of microbatches: all ranks drop it alike, and what was exchanged for it.
            self._delivery.take(request)
            request = moved = None
        if request is None and self._exchanges is not None and self._exchanges.at_call and not key[1]:
            moved = self._exchange_now(self._exchanges, source, count)
        # What has moved is a copy: a replica's own microbatches leave its data in the order in which they were read.
        microbatches = source.take(count) if moved is None else (source.take(count), moved)[1]
        news = b"" if key[1] else self._agreement.news(chunks)
        asked = None
        if request is None:
            asked, seconds = time.perf_counter(), self._policy.at_call_seconds
            request = self._request(microbatches, self._number(), key[1], budget=seconds, wait=seconds)
        delivered = self._delivery.take(request, news)
        if self._agreement.learn(delivered.news):  # planned for what trained before
            delivered = self._delivery.take(self._request(microbatches, self._number(), key[1], budget=0.0, wait=0.0))
        if asked is not None:
            delivered = replace(delivered, stall_seconds=time.perf_counter() - asked, at_call=True)
        if not key[1]:
            self._agreement.check(delivered.plan, f"iteration {self._number()}")
        for inputs, shared in zip(microbatches, delivered.shared, strict=True):
            self._program.complete(inputs, shared)
        return microbatches, delivered

    def _read_ahead(self, key: tuple[int, bool], source: LookAhead, count: int, began: float) -> Iterator[None]:
        """Read the next iteration's microbatches step by step, then request its plan; this one ``began`` at that time.
        The first pipeline rank, on which plans are made, waits less often than the others and takes larger steps."""
        each = 2 if self._executor.position.rank == 0 else 1
        for ready in range(each, count + each, each):
            source.fill(min(ready, count))
            yield
        coming = source.peek(count)
        number = self._number() + 1

        def ask(microbatches: list[MicrobatchInputs], moved: bool = True) -> None:
            budget = self._policy.budget(self._durations.left(began))
            request = self._request(microbatches, number, False, budget, wait=1.3 * budget + 0.1, ahead=True)
            self._next_request[key] = (request, count, microbatches if moved else None)

        complete = len(coming) == count
        if self._exchanges is not None:
            left = self._durations.left(began)
            self._exchanges.begin(self._quoted(coming, complete), coming, complete, left, ask)
        elif complete:
            ask(coming, False)

    def _settle(self, forward_only: bool) -> None:
        """Wait for the exchange that is under way, if any."""
        settled = None if self._exchanges is None else self._exchanges.settle()
        if settled is not None or not forward_only:
            self._exchanged = settled

    def _exchange_now(self, exchanges: ExchangesAhead, source: LookAhead, count: int) -> list[MicrobatchInputs] | None:
        """What this replica has once all have exchanged what they were called with; None if its data has ended."""
        coming = source.peek(count)
        complete = len(coming) == count
        found, self._exchanged = exchanges.now(self._quoted(coming, complete), coming, complete)
        return found if complete else None

    def _quoted(self, coming: list[MicrobatchInputs], complete: bool) -> Any:
        """What the price of an exchange takes."""
        here = self._delivery.plans_here and complete
        return tuple(self._program.load(m) for m in coming) if here else (), self._agreement.training

    def _source(
        self, key: tuple[int, bool], iterator: Iterator[Any] | None, forward_step_func: Callable[..., Any],
        chunks: list[torch.nn.Module],
    ) -> LookAhead:  # fmt: skip
        other = None if iterator is None else self._look_ahead.get((key[0], not key[1]))
        if other is not None and other[1].waiting:
            raise ValueError(
                f"training and evaluation share a data iterator, of which {other[1].waiting} microbatches have been "
                "read ahead; set read_ahead: false in --dip-config (DIP_READ_AHEAD=false)"
            )
        # Loops may make an iterator for each call: none is kept of which nothing has been read ahead.
        self._look_ahead = {k: known for k, known in self._look_ahead.items() if k == key or known[1].waiting}
        known = self._look_ahead.get(key)
        # The iterator itself is kept, so that its id can't be another's.
        if known is None or known[0] is not iterator:
            items = None if iterator is None else RawItems(iterator)
            gather = None if self._tensor_parallel is None else self._tensor_parallel.gather
            read = lambda: capture_microbatch(forward_step_func, items, chunks[-1], self._program)  # noqa: E731
            known = (iterator, LookAhead(read, items, gather, self._counts))
            self._look_ahead[key] = known
        return known[1]

    def _request(
        self, microbatches: list[MicrobatchInputs], iteration: int, forward_only: bool, budget: float, wait: float,
        ahead: bool = False,
    ) -> int:  # fmt: skip
        self._requests += 1
        here = self._delivery.plans_here
        loads = tuple(self._program.load(m) for m in microbatches) if here else ()
        shared = tuple(self._program.shared(m) for m in microbatches) if here else ()
        training = None if forward_only else self._agreement.training
        request = PlanRequest(
            self._requests, (loads,), budget, forward_only, iteration=iteration, training=training
        )  # fmt: skip
        self._delivery.request(request, wait, shared, ahead, hurries=self._policy.budget_seconds is None)
        return self._requests
