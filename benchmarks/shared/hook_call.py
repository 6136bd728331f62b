"""What a call of Megatron-Core's ``get_forward_backward_func`` costs with DIP's hook in place and DIP off."""

from __future__ import annotations

import json
import statistics
import timeit

from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()  # does nothing where CUDA is available

from megatron.core.pipeline_parallel import schedules  # noqa: E402

import dip_megatron  # noqa: E402

CALLS, ROUNDS = 20_000, 15


def main() -> None:
    """Print microseconds a call as JSON: medians over rounds in turns."""
    original = schedules.get_forward_backward_func
    dip_megatron.install()
    hooked = schedules.get_forward_backward_func
    assert hooked(2, None) is original(2, None)
    theirs, ours = [], []
    for _ in range(ROUNDS):
        theirs.append(timeit.timeit(lambda: original(2, None), number=CALLS))
        ours.append(timeit.timeit(lambda: hooked(2, None), number=CALLS))
    microseconds = 1e6 / CALLS
    print(json.dumps({
        "theirs": microseconds * statistics.median(theirs), "ours": microseconds * statistics.median(ours),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
