"""Ahead-of-use compilation of the inner loops.

Kernels get their buffers handed in and allocate nothing, so numba's reference counting (``_nrt``) is switched off: it
costs more than the kernels' own work. They run without Python's lock, so that threads search in parallel, and are kept
on disk between processes. What is kept knows the file of a kernel, not those of its pieces: after a change to one,
remove ``__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compile ``function`` to machine code at its first call, or load it from the cache."""
    return cast(Callable[Arguments, Result], njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function))


def inlined(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Like :func:`compiled`, for helpers with many array arguments: pasted into the kernels that call them."""
    return cast(
        Callable[Arguments, Result],
        njit(nogil=True, error_model="numpy", _nrt=False, inline="always")(function),
    )


def allocating(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Like :func:`compiled`, for what runs once an iteration and makes its own buffers."""
    return cast(Callable[Arguments, Result], njit(cache=True, nogil=True, error_model="numpy")(function))


def _trailing_zeros(_: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


trailing_zeros: Callable[[np.uint64], int] = intrinsic(_trailing_zeros)
"""Place of the lowest 1 in a 64-bit word that has one."""
