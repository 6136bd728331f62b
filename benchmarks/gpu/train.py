"""What each rank of ``scripts/bench gpu`` does: it measures costs with the others, then runs every schedule's plans."""

from __future__ import annotations

import gc
import json
import os
import pickle
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from benchmarks.shared.worker import Worker, squared_norm
from dip_megatron.core import Channel, Plan, TensorSpec
from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import idle_share, simulate
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import Costs, load_cluster
from dip_megatron.describe.workload import GlobalBatch
from dip_megatron.families.llava.mixed import MixedLlavaProgram
from dip_megatron.families.llava.program import LlavaProgram
from dip_megatron.megatron.call import ScheduleCall
from dip_megatron.megatron.iteration import Iteration
from dip_megatron.planner.facade import Setting as Planning
from dip_megatron.planner.maker import payloads
from dip_megatron.profile.operations import costs_of, profile_llava
from dip_megatron.profile.timing import measure
from dip_megatron.report.spans import Span, spans_of
from dip_megatron.report.trace import write_trace
from dip_megatron.runtime.clock import Clock
from dip_megatron.runtime.executor import Executor
from dip_megatron.runtime.protocol import MicrobatchInputs
from dip_megatron.testing.synthetic import draw_batch, forward_step, llava_arguments

from .report import print_table, summarize
from .schedules import Candidate, effort_of, plan_all
from .setting import Setting, batches_of, model_of, training_flops


class Bench:
    """What one rank keeps over the whole benchmark."""

    def __init__(self, setting: Setting, worker: Worker):
        self.setting, self.worker = setting, worker
        self.rank, self.ranks, self.device = worker.rank, worker.ranks, worker.device
        self.model = model_of(setting)
        self.arguments = llava_arguments(self.model, worker.dtype)
        self.batches = batches_of(setting, self.model)
        self.transport = worker.transport(setting.transport)
        self.clock = Clock(self.device)

    # -- costs ---------------------------------------------------------------------------------------------------
    def measure_costs(self) -> Costs:
        """The model's parts, a transfer, and nothing else: on all ranks at once, as in training."""
        packing = self.model.packing
        images = sorted({max(1, packing.max_images * n // 12) for n in (1, 2, 4, 8, 12)})
        tokens = [packing.max_tokens * n // 4 for n in (2, 3, 4)]
        self.worker.synchronize()
        samples = profile_llava(
            self.arguments, self.model.with_parallel(pp=1), self.device, images=images, tokens=tokens
        )
        self.worker.release()
        transfer = self.measure_transfer()
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return costs_of(self.worker.gather(samples), f"{name}, {self.ranks} ranks", transfer_seconds=transfer)

    def measure_transfer(self, laps: int = 20) -> float:
        """Seconds from rank to rank of one hidden state of the LLM, in a ring."""
        hidden = self.model.module("language").layer.hidden
        shape = (self.model.packing.max_tokens, 1, hidden)
        payload = (TensorSpec("hidden", shape, str(self.worker.dtype).removeprefix("torch.")),)
        before, after = (self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks
        incoming, outgoing = Channel(before, self.rank, False), Channel(self.rank, after, False)
        self.transport.open([incoming, outgoing])
        seconds = []
        for _ in range(3):
            self.worker.synchronize()
            begun = time.perf_counter()
            tensors, sends = {"hidden": torch.ones(shape, dtype=self.worker.dtype, device=self.device)}, []
            for lap in range(laps):
                if lap or self.rank:
                    tensors = self.transport.receive(incoming, payload).wait()
                sends.append(self.transport.send(outgoing, tensors))
            if self.rank == 0:
                self.transport.receive(incoming, payload).wait()
            for send in sends:
                send.wait()
            self.worker.wait_for_device()
            seconds.append((time.perf_counter() - begun) / (laps * self.ranks))
        return max(self.worker.gather(statistics.median(seconds)))

    def measure_peak(self) -> float:
        """FLOPs a second of a large matmul, all ranks at once: the sum over them."""
        n = 4096 if self.device.type == "cuda" else 256
        a, b = (torch.randn(n, n, device=self.device, dtype=self.worker.dtype) for _ in range(2))
        self.worker.synchronize()

        def multiply() -> None:
            for _ in range(10):
                torch.mm(a, b)

        seconds = measure([multiply], self.device)[0]
        return sum(self.worker.gather(10 * 2.0 * n**3 / seconds))

    # -- schedules -----------------------------------------------------------------------------------------------
    def candidates(self, costs: Costs) -> list[Candidate]:
        """Every schedule's plans, made on the first rank."""
        setting = self.setting
        mine = b""
        if self.rank == 0:
            await_warm_up()
            cluster = load_cluster("h100" if self.device.type == "cuda" else "cpu")
            batches = tuple(GlobalBatch(batch) for batch in self.batches)
            planning = Planning(self.model, cluster, batches, costs, setting.memory_gb * 1e9)
            effort = effort_of(setting.search_seconds, setting.search_workers)
            found = plan_all(setting.schedules, planning, effort, setting.partition_seconds, self.worker.log)
            mine = pickle.dumps(found)
        candidates: list[Candidate] = pickle.loads(self.worker.exchange.broadcast(mine if self.rank == 0 else None))
        return candidates

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Measure one schedule. An error on one rank ends the benchmark on all."""
        result: dict[str, Any] = {"name": candidate.name, "layout": candidate.describe(), "iterations": []}
        if not candidate.planned:
            return result | {"failure": candidate.failure}
        program = self._program(candidate)
        bare = program.build_chunks()
        chunks = self.worker.wrapped(bare, self.setting.seed)
        if not all(self.worker.gather(program.supports_split)):
            return result | {"failure": "some layers can't split their backward"}
        optimizer = self._optimizer(chunks) if self.setting.optimizer else None
        executor = Executor(self.rank, self.transport, self.clock)
        for turn in range(1 + self.setting.rounds):
            for number, (batch, planned) in enumerate(zip(self.batches, candidate.planned, strict=True)):
                shapes = payloads(planned.graph, batch, program.shapes)
                plan = make_plan(planned.graph, planned.schedule, lower_bound=planned.lower_bound,
                                 name=candidate.name, payloads=shapes)  # fmt: skip
                verify(plan)
                last = turn == self.setting.rounds and number == len(self.batches) - 1
                measured = self._iterate(program, chunks, executor, plan, number, trace=last)
                if turn:
                    step_seconds = self._step(optimizer)
                    result["iterations"].append(measured | {"batch": number, "optimizer_seconds": step_seconds})
        times = [i["seconds"] for i in result["iterations"]]
        self.worker.log(f"{candidate.name}: {statistics.mean(times):.3f} s an iteration, loss "
                 f"{result['iterations'][-1]['loss']:.4f}")  # fmt: skip
        del program, bare, chunks, optimizer
        self.worker.release()
        return result

    def _program(self, candidate: Candidate) -> LlavaProgram:
        if candidate.choice is not None:
            (part,) = candidate.choice.modules
            return MixedLlavaProgram(self.arguments, part, rank=self.rank)
        assert candidate.partition is not None
        return LlavaProgram(self.arguments, {m.module: m.layers for m in candidate.partition.modules}, rank=self.rank)

    def _optimizer(self, chunks: list[torch.nn.Module]) -> Any:
        bf16 = self.worker.dtype == torch.bfloat16
        config = OptimizerConfig(
            optimizer="adam", lr=1e-4, weight_decay=0.0, bf16=bf16, params_dtype=self.worker.dtype, clip_grad=0.0,
            use_distributed_optimizer=False,
        )  # fmt: skip
        return get_megatron_optimizer(config, chunks)

    def _step(self, optimizer: Any) -> float:
        if optimizer is None:
            return 0.0
        begun = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        self.worker.wait_for_device()
        return max(self.worker.gather(time.perf_counter() - begun))

    def _iterate(
        self, program: LlavaProgram, chunks: list[torch.nn.Module], executor: Executor, plan: Plan, number: int,
        trace: bool,
    ) -> dict[str, Any]:  # fmt: skip
        setting, batch = self.setting, self.batches[number]
        inputs = []
        for i, load in enumerate(batch):
            drawn = draw_batch(load, self.arguments, self.device, setting.seed + 1000 * number + i)
            ordered = (drawn["images"], drawn["tokens"], drawn["position_ids"], None, drawn["labels"])
            inputs.append(MicrobatchInputs(program.bind(*ordered, drawn["loss_mask"]), [drawn]))
        for chunk in chunks:
            chunk.zero_grad_buffer()
        call = ScheduleCall(
            forward_step_func=forward_step, data_iterator=None, model=chunks, num_microbatches=len(inputs)
        )
        iteration = Iteration(program, executor, plan, call, inputs)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        gc.disable()
        self.worker.synchronize()
        begun = time.monotonic()
        self.clock.begin()
        iteration.run()
        tokens = float(sum(m.text_tokens for m in batch))
        for chunk in chunks:
            chunk.scale_gradients(1.0 / tokens)
        self.worker.wait_for_device()
        ended = time.monotonic()
        gc.enable()
        return self._record(plan, number, begun, ended, iteration.losses, trace, chunks)

    def _record(
        self, plan: Plan, number: int, begun: float, ended: float, losses: list[Any], trace: bool,
        chunks: list[torch.nn.Module],
    ) -> dict[str, Any]:  # fmt: skip
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        sums = [loss["lm loss"].double().cpu() for loss in losses]
        mine = (begun, ended, self.clock.spans(), peak, [s.tolist() for s in sums], squared_norm(chunks))
        everyone = self.worker.gather(mine)
        first = min(line[0] for line in everyone)
        seconds = max(line[1] for line in everyone) - first
        measured = [
            Span(rank, s.operation, s.microbatch, s.start + line[0] - first, s.end + line[0] - first)
            for rank, line in enumerate(everyone)
            for s in line[2]
        ]
        if trace and self.rank == 0:
            planned = spans_of(plan.graph, plan.schedule, simulate(plan.graph, plan.schedule))
            write_trace(Path(self.setting.out) / f"trace-{plan.name}.json", planned, measured)
        pairs = [pair for line in everyone for pair in line[4]]
        batch = self.batches[number]
        busy = sum(s.end - s.start for s in measured)
        return {
            "seconds": seconds,
            "predicted_seconds": plan.predicted.iteration_time,
            "lower_bound": plan.predicted.lower_bound,
            "bubble_measured": idle_share(busy, seconds * self.ranks),
            "bubble_predicted": plan.predicted.bubble_ratio,
            "busy_seconds": [sum(s.end - s.start for s in measured if s.rank == r) for r in self.worker.everyone],
            "predicted_busy_seconds": busy_of(plan),
            "tokens": sum(m.tokens for m in batch),
            "flops": training_flops(self.model, batch),
            "losses": [p[0] / p[1] for p in pairs],
            "loss": sum(p[0] for p in pairs) / sum(p[1] for p in pairs),
            "gradient_norm": sum(line[5] for line in everyone) ** 0.5,
            "peak_bytes": [line[3] for line in everyone],
            "predicted_peak_bytes": list(plan.predicted.peak_bytes),
        }


def await_warm_up(seconds: float = 120.0) -> None:
    """Wait until the process that compiles the search's kernels has ended."""
    process = os.environ.get("DIP_BENCH_WARMING")
    deadline = time.monotonic() + seconds
    while process and time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # ended; its parent has not asked yet
            return
        time.sleep(0.1)


def busy_of(plan: Plan) -> list[float]:
    """Seconds of computing per rank, as planned."""
    timeline = simulate(plan.graph, plan.schedule)
    return [float((e - s).sum()) for s, e in zip(timeline.start, timeline.end, strict=True)]


def work(worker: Worker, given: dict[str, Any]) -> None:
    """Run the whole benchmark on one rank; the first rank writes the results and prints the table."""
    setting = Setting(**given)
    bench = Bench(setting, worker)
    out = Path(setting.out)
    if setting.costs:
        costs = Costs.load(setting.costs)
    else:
        worker.log("measuring the model's parts on all ranks at once")
        costs = bench.measure_costs()
        if worker.rank == 0:
            costs.save(out / "costs.json")
    peak = bench.measure_peak()
    worker.log(
        f"a transfer takes {1e6 * (costs.transfer_seconds or 0):.0f} us; matmuls reach {peak / 1e12:.1f} TFLOP/s in all"
    )
    candidates = bench.candidates(costs)
    results = []
    for candidate in candidates:
        results.append(bench.run(candidate))
        if worker.rank == 0:  # what has been measured is kept, whatever comes
            lines = summarize(results, peak)
            record = {"setting": setting.record(), "device": costs.device, "peak_flops": peak, "summary": lines,
                      "results": results}  # fmt: skip
            (out / "results.json").write_text(json.dumps(record, indent=1))
    if worker.rank == 0:
        print_table(summarize(results, peak), f"{bench.model.name} on {costs.device}")
