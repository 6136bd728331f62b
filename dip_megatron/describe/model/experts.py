"""Mixtures of experts: what stands in a layer instead of its MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class LayerKind(NamedTuple):
    """What layers of one module may differ in: attention to all of a sequence, or to windows, or linear; experts or an
    MLP."""

    full_attention: bool = True
    experts: bool = False


@dataclass(frozen=True)
class Experts:
    """``count`` experts of inner width ``ffn``, of which each token goes to ``active``; ``shared_ffn`` is the inner
    width of what every token goes through besides (0: nothing).

    Layer i has them, instead of the MLP, if i is at least ``dense_first`` and ``pattern[i % len(pattern)]``.
    ``imbalance``: tokens of the rank whose experts get the most, over the mean. How many an expert gets isn't known
    before it runs, so that this is assumed; in training measured times correct it.
    """

    count: int
    active: int
    ffn: int
    shared_ffn: int = 0
    dense_first: int = 0
    pattern: tuple[bool, ...] = (True,)
    imbalance: float = 1.15

    def __post_init__(self) -> None:
        for name in ("count", "active", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.active > self.count:
            raise ValueError(f"active: a token can't go to {self.active} of {self.count} experts")
        if self.imbalance < 1.0 or not self.pattern:
            raise ValueError("imbalance must be at least 1, and pattern list at least one layer")

    def in_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) has experts."""
        return layer >= self.dense_first and self.pattern[layer % len(self.pattern)]
