"""Ahead-of-use compilation of the inner loops.

Kernels get their buffers handed in and allocate nothing, so numba's reference counting (``_nrt``) is switched off: it
costs more than the kernels' own work. They run without Python's lock, so that threads search in parallel, and are kept
on disk between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

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
