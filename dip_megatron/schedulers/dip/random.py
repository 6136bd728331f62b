"""Random numbers for kernels: splitmix64, whose whole state is one number, so that a search can stop and go on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.simulate.compiled import compiled


@compiled
def uniform(state: NDArray[np.uint64]) -> float:
    """The next number in [0, 1); ``state`` ``[1]`` moves on."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def below(state: NDArray[np.uint64], count: int) -> int:
    """The next whole number in [0, count)."""
    return min(int(uniform(state) * count), count - 1)


def seeded(seed: int, stream: int) -> NDArray[np.uint64]:
    """A state of its own for each (seed, stream)."""
    return np.random.SeedSequence([seed & 0xFFFFFFFF, stream]).generate_state(1, np.uint64).astype(np.uint64)
