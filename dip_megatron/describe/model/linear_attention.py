"""Linear attention: what stands in a layer instead of attention over all of a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatedDeltaNet:
    """Gated delta rule (arXiv 2412.06464): each of ``value_heads`` heads keeps a state of ``key_dim x value_dim``, that
    a token decays and corrects; ``key_heads`` are shared among value heads as in grouped attention. Queries, keys and
    values pass a causal convolution of width ``convolution`` a channel, outputs are normalised and gated. Kernels go
    through a sequence in chunks of ``chunk`` tokens."""

    key_heads: int
    value_heads: int
    key_dim: int = 128
    value_dim: int = 128
    convolution: int = 4
    chunk: int = 64

    @property
    def key_width(self) -> int:
        """Channels of all keys, and as many of all queries."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Channels of all values, and as many of the outputs and of their gate."""
        return self.value_heads * self.value_dim

    def parameters(self, hidden: int) -> int:
        """Of one layer of width ``hidden``: projections to queries, keys, values and gate, to decay and step size of
        each value head, from the outputs; convolutions."""
        mixed = 2 * self.key_width + self.value_width
        inward = hidden * (mixed + self.value_width + 2 * self.value_heads)
        return inward + self.convolution * mixed + self.value_width * hidden
