"""The planner's compiled kernels: whether they are there, and where they are kept from one process to the next."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .check import Check, Status
from .libraries import importable

SEARCH = 6.0
"""Times as long as the kernels that check plans take those of a search to be compiled, about."""
_NAME, _SET = "compiled kernels", "NUMBA_CACHE_DIR"


def kernels() -> Iterator[Check]:
    """Compile those that check plans, or find them; look whether those of a search are there."""
    if not importable("numba"):
        return
    compiled = importlib.import_module("dip_megatron.core.simulate.compiled")
    warm = importlib.import_module("dip_megatron.planner.warm")
    first = importlib.import_module("dip_megatron.core.kernels").check_codes
    search = compiled.kernels_of("dip_megatron.schedulers.dip")
    folder, known = compiled.kept_in(first), compiled.is_kept(first)
    began = time.process_time()
    warm.warm_up_plans()
    took = time.process_time() - began
    missing = sum(not compiled.is_kept(kernel) for kernel in search)
    there = f"{len(search) - missing} of a search's {len(search)} are there"
    found = there if known else f"{there}; those that check plans took {took:.1f} s to compile"
    cost = f"{'' if known else f', about {SEARCH * took:.0f} s of a core'}; training has simple plans meanwhile"
    asked = os.environ.get(_SET)
    if folder is None or not compiled.is_kept(first):
        where = "no folder to keep them in can be written to" if folder is None else f"{folder} takes no more of them"
        yield Check(
            _NAME, Status.LIMITED, f"{found}; {where}", f"each process that plans compiles them at every start{cost}",
            f"set {_SET} to a folder that can be written to, on a disk that lasts",
        )  # fmt: skip
    elif asked and not folder.is_relative_to(Path(asked).resolve()):
        yield Check(
            _NAME, Status.LIMITED, f"{found}, in {folder}, as {_SET}={asked} can't be written to",
            "they are compiled again where that folder doesn't last", f"set {_SET} to one that can be written to",
        )  # fmt: skip
    elif missing:
        yield Check(
            _NAME, Status.LIMITED, f"{found}, in {folder}", f"the first run compiles the others{cost}",
            "compile them now: dip doctor --compile",
        )  # fmt: skip
    else:
        yield Check(_NAME, Status.OK, f"{found}, in {folder}")
