"""What each rank of ``scripts/bench executor`` does: Megatron's schedules and DIP's executor in turns, on one batch."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import schedules

from benchmarks.shared.models import gpt, language_model
from benchmarks.shared.worker import TIMEOUT, Worker, squared_norm
from dip_megatron.core import Kind, ModalityModule, Operation, OperationGraph, Plan, Schedule, Unit
from dip_megatron.core.lower import make_plan
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.simulate import simulate
from dip_megatron.describe.model import MultimodalModel, Packing, TransformerLayer
from dip_megatron.describe.workload import Microbatch
from dip_megatron.families.gpt.program import GptProgram
from dip_megatron.families.shared.shapes import LANGUAGE
from dip_megatron.megatron.call import ScheduleCall
from dip_megatron.megatron.exchange import GlooExchange
from dip_megatron.megatron.forward_backward import DipForwardBackward
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.maker import payloads
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from dip_megatron.profile.operations import OperationSeconds, profile_operation
from dip_megatron.report.breakdown import gaps
from dip_megatron.runtime.clock import Clock, MeasuredSpan
from dip_megatron.runtime.executor import Executor
from dip_megatron.runtime.protocol import MicrobatchInputs
from dip_megatron.schedulers.megatron import interleaved, one_forward_one_backward
from dip_megatron.schedulers.zero_bubble import zb_h1
from dip_megatron.testing.synthetic import draw_text, gpt_arguments, gpt_forward_step


@dataclass(frozen=True)
class Setting:
    """What to measure. ``layers`` are those of the whole model, in even chunks."""

    hidden: int
    tokens: int
    vocabulary: int
    layers: int
    segments: int
    microbatches: int
    bubble_microbatches: int
    rounds: int
    seed: int
    ranks: int = 2

    def model(self) -> MultimodalModel:
        """A GPT of equal layers, whose vocabulary is small so that its ends weigh little."""
        layer = TransformerLayer(self.hidden, 4 * self.hidden, max(1, self.hidden // 64), max(1, self.hidden // 64),
                                 causal=True)  # fmt: skip
        language = language_model(self.layers, layer, self.vocabulary)
        return gpt(language, self.ranks, Packing(max_tokens=self.tokens))


@dataclass(frozen=True)
class FixedPlan:
    """Makes the one plan that is measured; see ``planner.request.PlanMaker``."""

    plan: Plan

    def warm_up(self) -> None:
        """Nothing to compile."""

    def quick(self, request: PlanRequest) -> PlanSet:
        return PlanSet((self.plan,))

    def best(self, request: PlanRequest, give: Callable[[PlanSet], None]) -> PlanSet:
        return PlanSet((self.plan,))


class Bench:
    """What one rank keeps over the whole benchmark."""

    def __init__(self, setting: Setting, worker: Worker):
        self.setting, self.worker = setting, worker
        self.rank, self.ranks = worker.rank, worker.ranks
        self.transport = worker.transport()
        self.model = setting.model()
        self.text = draw_text(setting.tokens, self._arguments(), worker.device, setting.seed)

    def _arguments(self) -> dict[str, Any]:
        arguments = gpt_arguments(self.model, self.worker.dtype)
        # Megatron's interleaved schedule on two ranks needs overlapped sends, and releases before 0.18 free what these
        # still need; so nobody frees outputs.
        arguments["config"].deallocate_pipeline_outputs = False
        return arguments

    # -- the two sides -------------------------------------------------------------------------------------------
    def megatrons(self, segments: int, microbatches: int) -> Callable[[], list[Any]]:
        """One iteration under Megatron's own schedule: 1F1B, or interleaved with several segments."""
        arguments, virtual = self._arguments(), segments > 1
        config = arguments["config"]
        config.virtual_pipeline_model_parallel_size = segments if virtual else None
        config.overlap_p2p_comm, config.batch_p2p_comm = virtual, not virtual

        def virtually(function: Callable[[], Any]) -> Any:
            if virtual:
                parallel_state.set_virtual_pipeline_model_parallel_world_size(segments)
            try:
                return function()
            finally:
                parallel_state.set_virtual_pipeline_model_parallel_world_size(None)

        def build() -> list[torch.nn.Module]:
            return [
                GPTModel(
                    **arguments, vp_stage=k if virtual else None, pre_process=self.rank == 0 and k == 0,
                    post_process=self.rank == self.ranks - 1 and k == segments - 1,
                )
                for k in range(segments)
            ]  # fmt: skip

        chunks = self._wrapped(virtually(build))
        data = [itertools.repeat(self.text) for _ in chunks]

        def iterate() -> list[Any]:
            losses: list[Any] = schedules.get_forward_backward_func()(
                forward_step_func=gpt_forward_step, data_iterator=data if virtual else data[0], model=chunks,
                num_microbatches=microbatches, seq_length=self.setting.tokens, micro_batch_size=1,
                decoder_seq_length=self.setting.tokens, forward_only=False,
            )  # fmt: skip
            return losses

        return self._cleared(chunks, lambda: virtually(iterate))

    def dips(
        self, segments: int, microbatches: int, order: Callable[[OperationGraph], Schedule]
    ) -> tuple[Callable[[], list[Any]], GptProgram, list[torch.nn.Module], list[Any]]:
        """One iteration under DIP's, in ``order``; the program and its chunks; plans and spans, once it runs."""
        even = self.setting.layers // (segments * self.ranks)
        program = GptProgram(self._arguments(), {LANGUAGE: ((even,) * self.ranks,) * segments}, rank=self.rank)
        chunks = self._wrapped(program.build_chunks())
        loads = (Microbatch(self.setting.tokens, sequences=(self.setting.tokens,)),) * microbatches
        graph = self.graph(program.modules[0], microbatches, self.measure_operations(program, chunks))
        plan = make_plan(graph, order(graph), lower_bound=0.0, payloads=payloads(graph, loads, program.shapes))
        service = PlannerService(FixedPlan(plan), workers=0) if self.rank == 0 else None
        clock, reports = Clock(self.worker.device), []
        step = DipForwardBackward(
            program, Executor(self.rank, self.transport, clock),
            PlanDelivery(GlooExchange(self.worker.everyone, TIMEOUT), service), clock,
            on_iteration=lambda report, plan, spans: reports.append((plan, spans)),
        )  # fmt: skip
        data = itertools.repeat(self.text)

        def iterate() -> list[Any]:
            return step(
                ScheduleCall(
                    forward_step_func=gpt_forward_step, data_iterator=data, model=chunks, num_microbatches=microbatches
                )
            )

        return self._cleared(chunks, iterate), program, chunks, reports

    def _wrapped(self, bare: list[torch.nn.Module]) -> list[torch.nn.Module]:
        chunks = self.worker.wrapped(bare, self.setting.seed)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
        return chunks

    @staticmethod
    def _cleared(chunks: list[torch.nn.Module], iterate: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            for chunk in chunks:
                chunk.zero_grad_buffer()
            return iterate()

        run.chunks = chunks  # type: ignore[attr-defined]
        return run

    # -- costs ---------------------------------------------------------------------------------------------------
    def measure_operations(self, program: GptProgram, chunks: list[torch.nn.Module]) -> list[list[OperationSeconds]]:
        """Seconds of each stage, ``[segment][rank]``, measured on all ranks at once, as they compute in training."""
        arguments = dict(program.bind(self.text["tokens"], self.text["position_ids"], None, labels=self.text["labels"]))
        last = program.modules[0].segments - 1
        unit, load = Unit(0, LANGUAGE, 0), Microbatch(self.setting.tokens, sequences=(self.setting.tokens,))
        mine = []
        for k, chunk in enumerate(chunks):
            payload = program.shapes.payload(unit, load, leaves_module=False) if k or self.rank else ()
            self.worker.gather(None)
            mine.append(
                profile_operation(
                    program,
                    chunk,
                    Operation(Kind.F, LANGUAGE, k, 0, self.rank),
                    MicrobatchInputs(arguments),
                    payload,
                    self.worker.device,
                    final=k == last and self.rank == self.ranks - 1,
                    repeats=max(5, self.setting.rounds // 2),
                )
            )
        return [list(line) for line in zip(*self.worker.gather(mine), strict=True)]

    def graph(self, module: ModalityModule, count: int, stages: list[list[OperationSeconds]]) -> OperationGraph:
        """The stages of one iteration at these costs."""

        def seconds(name: str) -> np.ndarray:
            return np.array([[[getattr(s, name) for s in line] for line in stages] * count])

        rows, zeros = count * module.segments, np.zeros(self.ranks)
        return OperationGraph(
            ranks=self.ranks,
            modules=(module,),
            units=tuple(Unit(i, module.name, i) for i in range(count)),
            forward=seconds("forward"),
            backward=seconds("backward"),
            weight=seconds("weight"),
            fused=seconds("fused"),
            activation=np.zeros((1, rows, self.ranks)),
            deferred_activation=np.zeros((1, rows, self.ranks)),
            transfer=np.zeros(rows),
            static_bytes=zeros,
            memory_limit=zeros + np.inf,
        )

    # -- pairs ---------------------------------------------------------------------------------------------------
    def pairs(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[tuple[float, float]]:
        """Seconds of ours and of theirs, in turns; each the time from a common start to the last rank's end."""
        found: list[tuple[float, float]] = []
        for turn in range(self.setting.rounds + 2):
            line = {}
            for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
                line[side] = self.worker.timed(ours if side == "ours" else theirs)
            found.append((line["ours"], line["theirs"]))
        return found[2:]

    def check_equal(self, ours: Any, theirs: Any) -> float:
        """Largest difference of losses and gradient norms, relative; both sides compute the same thing or the
        comparison means nothing."""
        values = []
        for side in (ours, theirs):
            losses = [float(item["lm loss"][0]) for item in side()]
            values.append((sum(losses), squared_norm(side.chunks)))
        gathered = self.worker.gather(values)
        sums = [[sum(rank[side][i] for rank in gathered) for i in (0, 1)] for side in (0, 1)]
        worst = max(abs(a - b) / abs(b) for a, b in zip(*sums, strict=True))
        if worst > 1e-4:
            raise RuntimeError(f"DIP and Megatron disagree by {worst:.1e}: they don't train the same model")
        return worst


def interleaved_case(bench: Bench) -> dict[str, Any]:
    """DIP's executor against Megatron's interleaved schedule, the same order of the same stages."""
    setting = bench.setting
    theirs = bench.megatrons(setting.segments, setting.microbatches)
    ours, *_, reports = bench.dips(setting.segments, setting.microbatches, interleaved)
    difference = bench.check_equal(ours, theirs)
    pairs = bench.pairs(ours, theirs)
    measured = reports[-setting.rounds :]
    busy = [sum(s.end - s.start for s in spans) for _, spans in measured]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": [a / b for a, b in pairs],
        "busy": bench.worker.gather(statistics.median(busy)),
        "gaps": gap_seconds(bench, measured),
        "difference": difference,
    }


def gap_seconds(bench: Bench, measured: list[tuple[Plan, list[MeasuredSpan]]]) -> list[float]:
    """Quartiles, over all iterations and ranks, of what passes between two operations of a rank if the data of the
    second is there when the first ends."""
    everyone = bench.worker.gather([spans for _, spans in measured])
    found = [gap for i, (plan, _) in enumerate(measured) for gap in gaps(plan, [rank[i] for rank in everyone])]
    return statistics.quantiles(found, n=4)


def split_case(bench: Bench) -> dict[str, Any]:
    """DIP with its backward in two against Megatron's 1F1B, with few microbatches; measured and simulated."""
    setting = bench.setting
    theirs = bench.megatrons(1, setting.bubble_microbatches)
    ours, program, chunks, _ = bench.dips(1, setting.bubble_microbatches, zb_h1)
    difference = bench.check_equal(ours, theirs)
    before = bench.measure_operations(program, chunks)
    pairs = bench.pairs(ours, theirs)
    after = bench.measure_operations(program, chunks)
    predictions = []
    for stages in (before, after):
        graph = bench.graph(program.modules[0], setting.bubble_microbatches, stages)
        predictions.append([simulate(graph, make(graph)).iteration_time for make in (zb_h1, one_forward_one_backward)])
    predicted = statistics.mean(a / b for a, b in predictions)
    ratio = statistics.median(a / b for a, b in pairs)
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": ratio,
        "ratios": [a / b for a, b in pairs],
        "predicted": predicted,
        "predicted_ours": statistics.mean(a for a, _ in predictions),
        "predicted_theirs": statistics.mean(b for _, b in predictions),
        "stages": [[vars(s) for s in line] for line in after],
        "difference": difference,
    }


CASES = {"interleaved": interleaved_case, "split": split_case}


def work(worker: Worker, given: dict[str, Any]) -> None:
    """Run the cases on one rank; the first rank keeps each result in the file ``out`` as soon as it is known."""
    bench, results = Bench(Setting(**given["setting"]), worker), {}
    for name in given["cases"]:
        results[name] = CASES[name](bench)
        gc.collect()
        if worker.rank == 0:
            Path(given["out"]).write_text(json.dumps(results))
