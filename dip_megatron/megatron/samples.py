"""Microbatches taken apart into samples and packed anew, as the loop's :class:`SamplePacking` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from ..config import DipConfig
from ..core.graph import Floats
from ..describe.files import ConfigurationError
from ..describe.model import Training
from ..describe.workload import Microbatch
from ..planner.exchange_agreement import SampleQuote
from ..runtime.protocol import MicrobatchInputs, SamplePacking
from ..runtime.serialization import serialized_bytes
from .adapters.loop import LoopSettings

NO_PACKING = (
    "resample: nothing says how this loop's microbatches are split into samples and packed; give build_model or "
    "install a SamplePacking (samples=...; docs/balance.md), or leave resample out"
)
NOT_BY_TOKENS = (
    "resample: samples that change microbatches would weigh differently, since this loop averages over microbatches, "
    "not over tokens; use --calculate-per-token-loss (Bridge: model.calculate_per_token_loss, other loops: "
    "build_model(weights_by_tokens=True)), or leave resample out"
)
NO_BALANCE = "resample: samples move after whole microbatches have; ask for --dip-balance swap or free, too"
COUPLED = (
    "resample: replicas that share experts exchange whole microbatches alone, since theirs must be alike slot by slot; "
    "leave resample out"
)


def check_resample(config: DipConfig, loop: LoopSettings) -> None:
    """Refuse samples that move where they can't, or would train something else. Raises ConfigurationError."""
    if not config.resample:
        return
    for refused, sentence in (
        (config.balance == "off", NO_BALANCE), (loop.samples is None, NO_PACKING),
        (not loop.weights_by_tokens, NOT_BY_TOKENS), (loop.parallel.coupled > 1, COUPLED),
    ):  # fmt: skip
        if refused:
            raise ConfigurationError(sentence)


class PackingError(ValueError):
    """The loop's packing does not do what it says; the message tells what."""


class Program(Protocol):
    """What of a :class:`ModelProgram` is needed here."""

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...

    def load(self, inputs: MicrobatchInputs) -> Microbatch: ...


class Samples:
    """A loop's packing, with what of it can be checked."""

    def __init__(self, packing: SamplePacking, program: Program):
        self._packing, self._program = packing, program
        self._checked = False

    def split(self, microbatch: MicrobatchInputs, count: int | None = None) -> list[Any]:
        """Its samples. Raises PackingError if they are none, or not ``count`` (None: any number), as the first rank of
        the replica has found them."""
        with self._named("split"):
            found = list(self._packing.split(microbatch))
        if not found or len(found) != (count or len(found)):
            raise PackingError(
                f"{self._name}.split found {len(found)} samples in a microbatch, "
                + (f"on the replica's first rank {count}" if count else "there must be one at least")
            )
        return found

    def pack(self, samples: Sequence[Any]) -> MicrobatchInputs:
        """A microbatch of them. Raises PackingError if it is longer than it may be."""
        with self._named("tokens"):
            size = sum(int(self._packing.tokens(sample)) for sample in samples)
        if size > self._packing.length:
            raise PackingError(f"{self._name}: {size} tokens in a microbatch, at most {self._packing.length} fit")
        with self._named("pack"):
            packed = self._packing.pack(samples)
            return MicrobatchInputs(self._program.bind(**packed.arguments), packed.items)

    def quote(
        self, price: Callable[[Any], tuple[Floats, ...]], microbatches: Sequence[MicrobatchInputs],
        training: Training | None,
    ) -> SampleQuote:  # fmt: skip
        """What the samples of this replica's microbatches are worth: what they take with each less what they take
        without it. ``price`` is that of the exchange. Raises SerializationError for what can't travel, PackingError for
        a packing that contradicts itself."""
        split = [self.split(m) for m in microbatches]
        if not self._checked:
            self._check(split, microbatches)
        loads: list[Microbatch] = [self._program.load(m) for m in microbatches]
        whole = [m for m, samples in enumerate(split) for _ in samples]
        for m, samples in enumerate(split):
            for i in range(len(samples)):
                # One that is alone stays where it is.
                rest = [*samples[:i], *samples[i + 1 :]]
                loads.append(self._program.load(self.pack(rest)) if rest else loads[m])
        seconds, held, *_ = price((tuple(loads), training))
        first = len(microbatches)
        flat = [sample for samples in split for sample in samples]
        return SampleQuote(
            np.maximum(seconds[whole] - seconds[first:], 0.0), np.maximum(held[whole] - held[first:], 0.0),
            np.array([self._packing.tokens(sample) for sample in flat], dtype=np.int64),
            np.array([serialized_bytes(sample) for sample in flat], dtype=np.int64),
            np.array([len(samples) for samples in split], dtype=np.int64), int(self._packing.length),
        )  # fmt: skip

    def _check(self, split: Sequence[Sequence[Any]], microbatches: Sequence[MicrobatchInputs]) -> None:
        """Once: a microbatch that is taken apart and packed again holds what it held."""
        for samples, microbatch in zip(split, microbatches, strict=True):
            again, before = self._program.load(self.pack(samples)), self._program.load(microbatch)
            if again != before:
                raise PackingError(f"{self._name}: a microbatch of {before}, split and packed again, is one of {again}")
        self._checked = True

    @contextmanager
    def _named(self, method: str) -> Iterator[None]:
        """Whatever goes wrong in the loop's own code is told with its place: other ranks wait for this one."""
        try:
            yield
        except Exception as error:
            raise PackingError(f"{self._name}.{method}: {type(error).__name__}: {error}") from error

    @property
    def _name(self) -> str:
        return type(self._packing).__name__
