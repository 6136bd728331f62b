"""One rank of a rehearsal: the loop, and what is measured around it. Forked from a process that has imported it all."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ..megatron.cpu import install_cpu_platform

install_cpu_platform()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import schedules  # noqa: E402

from ..compat.lone_rank import groups_that_move_nothing  # noqa: E402
from ..config import DipConfig  # noqa: E402
from ..core import Plan  # noqa: E402
from ..core.experts import ExpertLayers  # noqa: E402
from ..describe.model import ModulePartition, Partition  # noqa: E402
from ..megatron.adapters.generic import GenericLoop  # noqa: E402
from ..megatron.checkpoints import Checkpoint, record  # noqa: E402
from ..megatron.exchange import GlooExchange  # noqa: E402
from ..megatron.forward_backward import IterationConsumer  # noqa: E402
from ..megatron.hooks import Hooks  # noqa: E402
from ..megatron.session import DipSession  # noqa: E402
from ..planner.service import PlannerService  # noqa: E402
from ..report.iterations import IterationReport  # noqa: E402
from ..runtime.clock import Clock  # noqa: E402
from ..runtime.executor import Executor  # noqa: E402
from ..runtime.groups import local_group  # noqa: E402
from ..runtime.transport_choice import choose_transport  # noqa: E402
from .job import CHECKPOINT, LATE_SECONDS, Job, Prices, read_prices  # noqa: E402
from .operations import (  # noqa: E402
    Account,
    AccountingClock,
    Meeting,
    RehearsedModel,
    SleepingExecutor,
    family,
    forward_step,
)


class RehearsalSession(DipSession):
    """A run whose stages sleep. Its ranks talk over gloo, as they would over NCCL: each waits for its messages asleep,
    and does what is to be done in the gaps at each wait, without seeing what has arrived."""

    prices: Prices
    scale: float
    account: Account
    report: IterationReport

    def _clock(self, device: torch.device) -> Clock:
        return AccountingClock(device, self.account)

    def _executor(
        self, pipeline: list[int], rank: int, clock: Clock, exchange: GlooExchange, device: torch.device
    ) -> Executor:
        transport = choose_transport(pipeline, rank, device, self._config.timeout_seconds, exchange, "gloo")
        meeting = None if self._experts is None else self._meeting(self._experts, rank)
        return SleepingExecutor(rank, transport, clock, self.prices, self.scale, self.account, meeting)

    def _meeting(self, experts: ExpertLayers, rank: int) -> Meeting:
        """As a dispatcher's exchange of tokens would, ranks of a stage wait for one another."""
        ranks = dist.get_process_group_ranks(parallel_state.get_expert_tensor_and_model_parallel_group())
        chunks = {(name, k) for name, rows in experts.modules for k, row in enumerate(rows) if any(row[rank])}
        group = local_group(ranks, "gloo", timedelta(seconds=self._config.timeout_seconds))
        return Meeting(frozenset(chunks), group)

    def _consumers(self, exchange: GlooExchange) -> list[IterationConsumer]:
        return [*super()._consumers(exchange), self._keep]

    def _keep(self, report: IterationReport, _: Plan, __: Any) -> None:
        self.report = report

    def wait_for_planner(self, most_seconds: float = 120.0) -> None:
        """As long as other jobs load their data and build their optimizer."""
        service, deadline = self._service, time.monotonic() + most_seconds
        while isinstance(service, PlannerService) and not service.ready() and time.monotonic() < deadline:
            time.sleep(0.2)

    @property
    def planners(self) -> list[subprocess.Popen[bytes]]:
        """The planner's processes, where there are some."""
        return self._service.processes if isinstance(self._service, PlannerService) else []


class RehearsedLoop(GenericLoop):
    """A loop with checkpoints of no weights: a file with what all ranks have to agree on."""

    def __init__(self, folder: Path, **settings: Any):
        super().__init__(**settings)
        self._path = folder / CHECKPOINT
        self._args = SimpleNamespace()
        self.saved: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def checkpoint(self) -> Checkpoint | None:
        """The one to go on from."""
        if not self.saved:
            return None
        parts = [
            ModulePartition(name, tuple(tuple(line) for line in m["layers"]), m["unit_size"])
            for name, m in self.saved["partition"].items()
        ]
        return Checkpoint(str(self._path), Partition(tuple(parts)), resumes=True, bound=False)

    def computes_on_cores(self) -> bool:
        """Stages sleep, as if devices computed them."""
        return False

    def record(self, chunks: Partition) -> str | None:
        """As Megatron's loop has it in its arguments."""
        record(self._args, chunks)
        return None

    def save(self, iteration: int) -> None:
        """After ``iteration`` iterations; all ranks call it."""
        dist.barrier()
        if dist.get_rank() == 0:
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps({"iteration": iteration, "partition": self._args.dip_partition}))
            fresh.replace(self._path)
        dist.barrier()


def main(folder: str, rank: int, port: int) -> None:
    """Run the rank: its lines go to ``rankN.jsonl`` in ``folder``, its words to ``rankN.log``."""
    place = Path(folder)
    with (place / f"rank{rank}.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    threading.Thread(target=_leave_with_parent, name="dip-parent", daemon=True).start()
    began = time.perf_counter()
    job = Job.read(place)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank // job.replicas), "WORLD_SIZE": str(job.ranks),
        # As if every replica had a host of its own, whose cores its planner counts.
        "LOCAL_WORLD_SIZE": str(job.stages), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with groups_that_move_nothing():
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=job.stages, expert_model_parallel_size=job.coupled,
            create_gloo_process_groups=False,
        )  # fmt: skip
    with (place / f"rank{rank}.jsonl").open("a", buffering=1, encoding="utf-8") as out:
        _train(job, place, lambda line: out.write(json.dumps(line) + "\n"), began)
    sys.stdout.flush()


def _leave_with_parent() -> None:
    """Whoever ends `dip rehearse` leaves no ranks behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(job: Job, folder: Path, write: Any, began: float) -> None:
    replica = parallel_state.get_data_parallel_rank()
    runs = Hooks.installed().runs
    if not any(f.model_class is RehearsedModel for f in runs.families()):
        runs.add_families([family("vlm-mix")])
    runs.make_session = RehearsalSession
    iteration = 0
    loop = RehearsedLoop(
        folder, micro_batch_size=1, num_microbatches=job.each, read_ahead=True, log_interval=job.iterations,
        another_follows=lambda: iteration + 1 < job.iterations,
    )  # fmt: skip
    first = iteration = loop.saved.get("iteration", 0)
    settings = dict(job.settings)
    if loop.saved:
        del settings["modules"]  # the checkpoint has them
    session = runs.begin(loop, DipConfig(schedule="dynamic", **settings))
    assert isinstance(session, RehearsalSession)
    session.scale, session.account = job.scale, Account()
    session.prices = read_prices(folder, parallel_state.get_pipeline_model_parallel_rank())
    provider = lambda **_: RehearsedModel(job.model, job.microbatches)  # noqa: E731
    chunks = session.segmented(provider)(pre_process=True, post_process=True)
    data = _data(job, replica, first)
    session.wait_for_planner()
    dist.barrier()
    write({"ready_seconds": time.perf_counter() - began})
    for iteration in range(first, job.iterations):
        _go_wrong(job, session, replica, iteration + 1)
        dist.barrier()
        spent = _Spent.now()
        losses = schedules.get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=data, model=chunks, num_microbatches=job.each,
            seq_length=1, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        line = spent.line(session)
        line |= {"iteration": iteration + 1, "numbers": round(sum(float(loss["number"]) for loss in losses))}
        if job.save_interval and (iteration + 1) % job.save_interval == 0:
            saving = time.perf_counter()
            loop.save(iteration + 1)
            line["checkpoint_seconds"] = time.perf_counter() - saving
        write(line)
    write(_held(session))
    dist.barrier()
    runs.end(session)
    dist.destroy_process_group()


def _data(job: Job, replica: int, first: int) -> Iterator[dict[str, Any]]:
    """What a replica's loader gives from iteration ``first`` on."""
    for iteration in range(first, job.iterations):
        for number in job.numbers(replica, iteration):
            yield {"number": number, "data": torch.zeros(job.microbatch_bytes, dtype=torch.uint8)}


def _go_wrong(job: Job, session: RehearsalSession, replica: int, iteration: int) -> None:
    """What is to happen here in this iteration."""
    for fault in (f for f in job.faults if f.iteration == iteration):
        if fault.kind == "rank dies" and fault.who == dist.get_rank():
            session.account.dies = True
        elif fault.kind != "rank dies" and fault.who == replica:
            for process in session.planners:
                if fault.kind == "planner dies":
                    process.kill()
                    process.wait(60.0)  # a busy machine lets it die late
                else:
                    process.send_signal(signal.SIGSTOP)
                    # By another process, in case that this one is gone by then.
                    later = f"sleep {LATE_SECONDS}; kill -CONT {process.pid}"
                    subprocess.Popen(["sh", "-c", later], stderr=subprocess.DEVNULL)


@dataclass(frozen=True)
class _Spent:
    """A moment: on the host's clock, and what of a core the process, its main thread and DIP's own threads had needed
    by then; ``watching`` is what looks at the store once a second."""

    at: float
    process: float
    main: float
    threads: float
    watching: float

    @staticmethod
    def now() -> _Spent:
        threads = watching = 0.0
        for thread in threading.enumerate():
            if thread.name.startswith("dip-") and thread.ident is not None:
                seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
                threads += seconds
                watching += seconds * thread.name.startswith("dip-watchdog")
        return _Spent(time.perf_counter(), time.process_time(), time.thread_time(), threads, watching)

    def line(self, session: RehearsalSession) -> dict[str, Any]:
        """Of the iteration that began then and has just ended, for ``rankN.jsonl``."""
        report, account, now = session.report, session.account, _Spent.now()
        main, threads = now.main - self.main, now.threads - self.threads
        # Seconds of the clock are stretched here: so much of the watching an iteration doesn't have where they aren't.
        stretched = (now.watching - self.watching) * (1 - 1 / max(session.scale, 1.0))
        exchange = report.exchange
        return {
            "seconds": now.at - self.at,
            "before_first_action": account.began - self.at,
            "control_core_seconds": main - account.stages + threads - stretched,
            "stage_core_seconds": account.stages,
            "gloo_core_seconds": now.process - self.process - main - threads,
            "predicted_seconds": report.predicted_seconds, "measured_seconds": report.iteration_seconds,
            "plan_seconds": report.plan_seconds, "latency_seconds": report.latency_seconds,
            "planner_core_seconds": report.planner_core_seconds, "stall_seconds": report.stall_seconds,
            "fallback": report.fallback, "late_plans": report.late_plans, "worker_deaths": report.worker_deaths,
            "exchange_seconds": 0.0 if exchange is None else exchange.seconds,
            "exchange_stall_seconds": 0.0 if exchange is None else exchange.stall_seconds,
            "moved": 0 if exchange is None else exchange.moved,
            "sent_bytes": 0 if exchange is None else exchange.sent_bytes,
        }  # fmt: skip


def _held(session: RehearsalSession) -> dict[str, Any]:
    """What the rank has of the machine, at the end of its run."""
    return {
        "own_bytes": _memory("self", "Private_Clean", "Private_Dirty"),
        "planner_bytes": [_memory(str(p.pid), "Pss") for p in session.planners],
        "files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
        "most_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }  # fmt: skip


def _memory(process: str, *fields: str) -> int:
    """Bytes; of shared pages ``Private_*`` counts none, ``Pss`` a share."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = dict(line.split()[:2] for line in text.splitlines()[1:])
    return sum(1024 * int(found[f"{name}:"]) for name in fields)
