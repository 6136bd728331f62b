"""One rank of a soak: the example's training script, with drifting data, faulty planner workers and a diary.

``python -m tests.soak.trainer SCRIPT ARGS...``; settings come in environment variables, since the arguments are
Megatron's: SOAK_DIARY (folder), SOAK_SAMPLES, SOAK_EVERY (requests between faults; 0: Megatron's own schedule), and
SOAK_PATIENT (set: a batch waits until a worker is idle). With SOAK_FATAL and SOAK_EXCHANGES faults are those of
exchanges between replicas, instead of the planner's.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dip_megatron.megatron.cpu import install_cpu_platform

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int | str) -> int:
    """Bytes a process holds in memory; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def workers() -> list[int]:
    """Planner workers of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"dip_megatron.planner.worker" in _command(pid)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def keep_diary(folder: Path) -> None:
    """Write down memory and planner statistics after every iteration."""
    from dip_megatron.report.progress import RunProgress

    record = RunProgress.record
    path = folder / f"diary.rank{os.environ['RANK']}.jsonl"
    diary = path.open("w", buffering=1)
    before: list[int] = []

    def record_and_write(self: RunProgress, report: Any, *rest: Any, **named: Any) -> None:
        nonlocal before
        record(self, report, *rest, **named)
        now = workers()
        line = {
            "iteration": report.iteration,
            "trainer_bytes": resident("self"),
            # A worker that has just been started is still loading: it says nothing of growth.
            "planner_bytes": max((resident(pid) for pid in now), default=0) if now == before else 0,
            "stall_seconds": report.stall_seconds,
            "fallbacks": report.fallbacks,
            "late_plans": report.late_plans,
            "worker_deaths": report.worker_deaths,
        }
        before = now
        diary.write(json.dumps(line) + "\n")

    RunProgress.record = record_and_write  # type: ignore[method-assign, assignment]


def main(arguments: Sequence[str]) -> None:
    """Run the script in this process."""
    install_cpu_platform()
    script, *flags = arguments
    every = int(os.environ["SOAK_EVERY"])
    sys.path.insert(0, str(Path(script).parent))
    import documents  # type: ignore[import-not-found]  # the script's own

    from .faults import FaultyService, drift

    drift(documents, int(os.environ["SOAK_SAMPLES"]))
    if "SOAK_FATAL" in os.environ:
        from .exchanges import disturb, number_samples, record_samples

        number_samples(documents)
        if every:
            import dip_megatron

            dip_megatron.install()
            disturb(every, os.environ["SOAK_FATAL"], int(os.environ["SOAK_EXCHANGES"]))
            record_samples(Path(os.environ["SOAK_DIARY"]))
    elif every:
        import dip_megatron

        FaultyService.every, FaultyService.patient = every, "SOAK_PATIENT" in os.environ
        session: Any = importlib.import_module("dip_megatron.megatron.session")
        session.PlannerService = FaultyService
        keep_diary(Path(os.environ["SOAK_DIARY"]))
        dip_megatron.install()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
