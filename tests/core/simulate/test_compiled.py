"""What kernels rely on in numba beyond its documented options."""

import numpy as np
import pytest
from numba import njit
from numba.core.errors import NumbaError

from dip_megatron.core.simulate.compiled import compiled, inlined, trailing_zeros


@compiled
def lowest(words):
    count = 0
    for i in range(len(words)):
        count = count * 100 + trailing_zeros(words[i])
    return count


@inlined
def twice(numbers, i):
    numbers[i] *= 2
    return numbers[i], numbers[i] + 1


@compiled
def doubled(numbers):
    total = 0
    for i in range(len(numbers)):
        here, after = twice(numbers, i)
        total += here * after
    return total


def allocating(count):
    return np.zeros(count).sum()


def test_the_lowest_bit_of_a_word():
    assert lowest(np.array([1 << 3, (1 << 63) | (1 << 40), 1 << 63], dtype=np.uint64)) == 34063


def test_pieces_are_pasted_in():
    numbers = np.array([1, 2, 3])
    assert doubled(numbers) == 2 * 3 + 4 * 5 + 6 * 7
    assert numbers.tolist() == [2, 4, 6]


def test_kernels_count_no_references():
    """The switch for it has an underscore, so a numba without it must be noticed. What counts none can't allocate."""
    assert njit(allocating)(3) == 0.0
    with pytest.raises(NumbaError):
        compiled(allocating)(3)
