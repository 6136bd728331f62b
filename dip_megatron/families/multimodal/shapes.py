"""Payload shapes of models whose encoders are cut at their call, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from ...core import Operation, Payload, TensorSpec, Unit
from ...describe.workload import Microbatch, shares
from ..shared.shapes import LANGUAGE

Layers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HiddenShape:
    """Hidden states between an encoder's layers: ``rows`` a token of the language model and ``extra`` an instance, one
    after the other, ``[rows, *middle, width]``; or, with ``padded``, so many rows for every instance, ``[instances,
    padded, width]``."""

    width: int
    rows: int = 1
    middle: tuple[int, ...] = ()
    padded: int = 0
    extra: int = 0

    def of(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """For instances that become so many tokens each."""
        if self.padded:
            return (len(tokens), self.padded, self.width)
        return (sum(tokens) * self.rows + len(tokens) * self.extra, *self.middle, self.width)


@dataclass(frozen=True)
class EncoderShapes:
    """What an encoder of ``layers[segment][rank]`` sends: ``hidden`` within it; the outputs of its ``tapped`` layers,
    which a module each has brought to the width of the language model, go on to the layer of the same index there.
    ``whole``: it is replicated, with all of its layers on every rank. ``ranks``: over how many ranks of a stage a
    unit's instances are shared out; within the encoder each hands on as much as the one with the most, and behind it
    the embeddings of all instances."""

    kind: str
    layers: Layers
    hidden: HiddenShape
    tapped: tuple[int, ...] = ()
    whole: bool = False
    ranks: int = 1

    def travels(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what goes from chunk to chunk of the encoder, for a unit's instances."""
        parts = [tokens[first : first + count] for first, count in shares(tokens, self.ranks)]
        return max(self.hidden.of(part) for part in parts)

    def until(self, segment: int, rank: int) -> int:
        """How many of its layers come before the end of that chunk."""
        return self.layers[0][rank] if self.whole else layers_until(self.layers, segment, rank)

    def ends(self, segment: int, rank: int) -> bool:
        """Whether it ends with that chunk."""
        return self.whole or (segment, rank) == (len(self.layers) - 1, len(self.layers[0]) - 1)


@dataclass(frozen=True)
class MultimodalShapes:
    """``encoders`` by module name; ``language`` are the layers of the language model, ``[segment][rank]``;
    ``micro_batch_size`` the samples of a microbatch that doesn't say otherwise. ``carried``: so many tensors as large
    as hidden states make one, one after the other along the sequence."""

    encoders: Mapping[str, EncoderShapes]
    language: Layers
    language_hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str
    context_parallel_size: int = 1
    carried: int = 1

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """Hidden states within an encoder, embeddings ``[tokens, language_hidden]`` after it; hidden states ``[s, b,
        language_hidden]`` of the language model. Beside them what taps made, as far as later stages need it."""
        place = (stage.segment, stage.rank)
        if stage.module == LANGUAGE:
            samples = load.rows or self.micro_batch_size
            length = load.tokens // samples // self.sequence_parallel_size // self.context_parallel_size
            hidden = (self.carried * length, samples, self.language_hidden)
            done = layers_until(self.language, *place)
            taps = [
                TensorSpec(f"tap{i}", (sum(load.encoded[e.kind]), self.language_hidden), self.dtype, made_by=name)
                for name, e in self.encoders.items()
                for i in range(done, len(e.tapped))
                if load.encoded.get(e.kind)
            ]
            return (TensorSpec("hidden", hidden, self.dtype), *taps)
        encoder = self.encoders[stage.module]
        tokens = load.encoded[encoder.kind][unit.first : unit.first + unit.count]
        embedded = (sum(tokens), self.language_hidden)
        done = encoder.until(*place)
        return (
            TensorSpec("hidden", embedded if encoder.ends(*place) else encoder.travels(tokens), self.dtype),
            *(TensorSpec(f"tap{i}", embedded, self.dtype) for i, layer in enumerate(encoder.tapped) if layer < done),
        )


def layers_until(layers: Layers, segment: int, rank: int) -> int:
    """How many of a module's layers come before the end of that chunk."""
    flat = [count for line in layers for count in line]
    return list(accumulate(flat))[segment * len(layers[0]) + rank]
