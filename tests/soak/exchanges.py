"""What happens to exchanges between replicas in a soak, and what each iteration trained on.

Faults that a run outlives come every so many exchanges: a replica is late with its numbers, its link is slow, it comes
to another assignment than the others. At a given iteration one comes that ends the run: a rank dies or falls silent in
the middle of an exchange, or sends another microbatch than was agreed on.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MILD = ("late", "slow", "differs")
FATAL = ("dies", "hangs", "mixes up")
LATE_SECONDS = 0.5


def disturb(every: int, fatal: str, exchanges: int) -> None:
    """Let exchanges of this rank suffer the next of :data:`MILD` every ``every`` times (0: never), and ``fatal`` (one
    of :data:`FATAL`, or nothing) once ``exchanges`` are done, on the last rank alone."""
    from dip_megatron.megatron import replicas
    from dip_megatron.planner import exchange_agreement

    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    done = itertools.count(1)
    at, fault = 0, ""
    draw = random.Random(rank)
    exchange, move = replicas.ReplicaExchange.exchange, replicas.ReplicaExchange._round

    def exchanged(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal at, fault
        at = next(done)
        number, rest = divmod(at, every) if every else (0, 1)
        fault = MILD[number % len(MILD)] if rest == 0 else ""
        if fault == "late" and rank == 1:
            time.sleep(LATE_SECONDS)
        return exchange(self, *arguments, **keywords)

    def settled(proposal: Any, answers: Any) -> Any:
        if fault == "differs":
            answers = [answers[0]._replace(digest="another"), *answers[1:]]
        return exchange_agreement.settle(proposal, answers)

    def moved(self: Any, out: Any, microbatch: Any, into: Any) -> Any:
        if fault == "slow" and rank == 0:
            time.sleep(draw.uniform(0.0, LATE_SECONDS))
        if fatal and rank == last and at > exchanges:
            if fatal == "dies":
                os._exit(3)
            if fatal == "hangs":
                time.sleep(1e6)
            if out is not None:
                out = out._replace(number=out.number + 1)
        return move(self, out, microbatch, into)

    replicas.ReplicaExchange.exchange = exchanged  # type: ignore[method-assign]
    replicas.ReplicaExchange._round = moved  # type: ignore[method-assign]
    replicas.settle = settled  # type: ignore[attr-defined]


def number_samples(documents: Any) -> None:
    """Let every item of the example's data say which one it is."""
    plain: Callable[..., Any] = documents.PackedDigitDocuments.__getitem__
    documents.PackedDigitDocuments.__getitem__ = lambda self, index: plain(self, index) | {"index": index}


def record_samples(folder: Path) -> None:
    """Write down, on every rank, the samples of each iteration once it has trained on them."""
    from dip_megatron.megatron import forward_backward
    from dip_megatron.megatron.iteration import Iteration

    lines = (folder / f"samples.rank{os.environ['RANK']}.jsonl").open("a", buffering=1)

    class Recorded(Iteration):
        def __init__(
            self, program: Any, executor: Any, plan: Any, call: Any, microbatches: Any, **keywords: Any
        ) -> None:
            super().__init__(program, executor, plan, call, microbatches, **keywords)
            self._held = [int(item["index"]) for m in microbatches for item in m.items or ()]
            self._trains = not call.forward_only

        def run(self, number: int = 0, *rest: Any, **keywords: Any) -> None:
            super().run(number, *rest, **keywords)
            if self._trains:
                lines.write(json.dumps({"iteration": number, "samples": self._held}) + "\n")

    forward_backward.Iteration = Recorded  # type: ignore[attr-defined, misc]
