"""``python -m tests.examples.installed SCRIPT ARGUMENTS...``: a script that calls ``dip_megatron.install()`` first.

``DIP_TEST_KILLED``: once so many training batches have been asked for, the planner's worker is killed.
"""

import os
import runpy
import sys

import dip_megatron
from dip_megatron.megatron.cpu import install_cpu_platform
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService

install_cpu_platform()
dip_megatron.install()

asked, submit = 0, PlannerService.submit


def submit_and_kill(self: PlannerService, request: PlanRequest) -> None:
    """From within: whoever looks from outside may come when the last iteration is over."""
    global asked
    submit(self, request)
    asked += not request.forward_only
    if not request.forward_only and asked == int(os.environ["DIP_TEST_KILLED"]):
        (worker,) = self.processes
        worker.kill()
        worker.wait()


if "DIP_TEST_KILLED" in os.environ:
    PlannerService.submit = submit_and_kill  # type: ignore[method-assign]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
