"""``python -m tests.megatron.stopping SCRIPT ARGUMENTS...``: a script under DIP, whose last rank is stopped in its
third step of the optimizer."""

import os
import runpy
import signal
import sys
import time
from typing import Any

from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()

from megatron.core.optimizer.optimizer import FP32Optimizer  # noqa: E402

import dip_megatron  # noqa: E402

dip_megatron.install()
steps, prepare_grads = 0, FP32Optimizer.prepare_grads


def prepare_or_stop(self: Any) -> Any:
    global steps
    steps += 1
    if steps == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(10.0)  # until it has shown for a while that it is alive
        os.kill(os.getpid(), signal.SIGSTOP)
    return prepare_grads(self)


FP32Optimizer.prepare_grads = prepare_or_stop  # type: ignore[method-assign]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
