"""Ahead-of-use compilation of the inner loops.

Kernels get their buffers handed in and allocate nothing, so numba's reference counting (``_nrt``) is switched off: it
costs more than the kernels' own work. They run without Python's lock, so that threads search in parallel, and are kept
on disk between processes. numba knows what is kept by the file of a kernel alone, though pieces of other files are in
it; so it is told the contents of all files with kernels (``_cache``), and compiles again after a change to any.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def digest_of(package: Path) -> str:
    """Of the contents of a package's files with kernels or pieces of them."""
    found = hashlib.sha256()
    for path in sorted(path for folder in ("core", "schedulers") for path in (package / folder).rglob("*.py")):
        text = path.read_bytes()
        if any(mark in text for mark in (b"\n@compiled", b"\n@inlined", b"\n@allocating", b"numba.extending")):
            found.update(path.relative_to(package).as_posix().encode() + b"\0" + text)
    return found.hexdigest()


KERNELS = digest_of(Path(__file__).resolve().parents[2])


def _kept(function: Callable[..., Any], **options: Any) -> Any:
    """The function with a cache that is stale, too, once another file's kernels have changed. Where the disk takes no
    more, or none may be written to, each process compiles for itself, and goes on."""
    make = partial(njit, nogil=True, error_model="numpy", **options)
    try:
        dispatcher = make(cache=True)(function)
    except RuntimeError as error:
        logger.warning("%s: each process compiles it; set NUMBA_CACHE_DIR to a folder that can be written", error)
        return make()(function)
    cache = dispatcher._cache
    cache._cache_file._source_stamp = (cache._cache_file._source_stamp, KERNELS)
    save = cache.save_overload

    def save_if_possible(*compiled: Any) -> None:
        try:
            save(*compiled)
        except OSError as error:
            logger.warning("can't keep %s once compiled in %s (%s)", function.__name__, cache.cache_path, error)

    cache.save_overload = save_if_possible
    return dispatcher


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compile ``function`` to machine code at its first call, or load it from the cache."""
    return cast(Callable[Arguments, Result], _kept(function, _nrt=False))


def inlined(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Like :func:`compiled`, for helpers with many array arguments: pasted into the kernels that call them."""
    return cast(
        Callable[Arguments, Result],
        njit(nogil=True, error_model="numpy", _nrt=False, inline="always")(function),
    )


def allocating(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Like :func:`compiled`, for what runs once an iteration and makes its own buffers."""
    return cast(Callable[Arguments, Result], _kept(function))


def kernels_of(package: str) -> list[Any]:
    """What the loaded modules of ``package`` keep between processes once it is compiled."""
    loaded = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{package}.")]
    found = [(module, value) for module in loaded for value in vars(module).values() if isinstance(value, Dispatcher)]
    own = [value for module, value in found if value.py_func.__module__ == module.__name__]
    return [value for value in own if value.targetoptions.get("inline") != "always"]


def kept_in(kernel: Any) -> Path | None:
    """The folder that ``kernel`` is kept in; None if none can be written to."""
    folder = kernel._cache.cache_path
    return None if folder is None else Path(folder)


def is_kept(kernel: Any) -> bool:
    """Whether it is there, compiled for this machine from the sources as they are."""
    if kept_in(kernel) is None:
        return False
    machine = kernel.targetctx.codegen().magic_tuple()
    return any(machine in key for key in kernel._cache._cache_file._load_index())


def _trailing_zeros(_: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


trailing_zeros: Callable[[np.uint64], int] = intrinsic(_trailing_zeros)
"""Place of the lowest 1 in a 64-bit word that has one."""
