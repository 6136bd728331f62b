"""Drawn sets of joint plans, run for real: two replicas of a tiny LLaVA on two pipeline ranks each, which share the
experts of its language model.

What each microbatch of a pool gives by itself, losses and gradients, is Megatron's: one rank, no pipeline, all experts.
Whatever a set runs of the pool, in whatever order and cut, must give the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dip_megatron.core import OperationGraph, Schedule
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.strategies import exchanging_strategies, format_strategy, strategy_names
from dip_megatron.planner.maker import payloads
from tests.core.joint.drawn_sets import run_at_random
from tests.runtime import llava_case
from tests.runtime.dip_case import DrawnGraphs
from tests.runtime.experts_case import EXPERTS, Ranks, deviation, found, initialize, wrapped
from tests.runtime.experts_case import ExpertsCase as Wrap
from tests.runtime.llava_case import Case, freeze_arguments, llava_kwargs

STAGES = REPLICAS = 2
DENSE_FIRST = (0, 1, 1, 1)
"""Which layers of the language model have experts: where there is a chunk without any, it is each replica's own."""
POOL = Case((0, 1, 2, 3, 0, 2, 1, 3, 1, 0, 4, 2), vision=((2,),), language=((4,),))
"""Images of each microbatch, the texts of which are of other lengths."""
LENGTHS = (12, 5, 9, 16, 7)
VIT = ("vision_model",)
CUTS = (
    replace(POOL, vision=((1, 1),), language=((2, 2),)),
    replace(POOL, vision=((1, 1),), language=((1, 1), (1, 1))),
    replace(POOL, vision=((1, 0), (0, 1)), language=((1, 1), (0, 2)), freeze=VIT),
    replace(POOL, vision=((0, 2),), language=((1, 0), (1, 2))),
    replace(POOL, vision=((2, 0),), language=((0, 1), (2, 1)), freeze=(*VIT, "vision_projection")),
    replace(POOL, vision=((1, 0), (1, 0)), language=((1, 2), (1, 0))),
    replace(POOL, vision=((1, 1),), language=((2, 2),), freeze=("language_model",)),
    replace(POOL, vision=((1, 1),), language=((2, 1), (0, 1)), freeze=("language_model", *VIT)),
)
"""Layers of each chunk, and what is frozen."""
BLOCK = 25
"""Sets that are run before the processes are asked what came out."""


def kwargs_of(pp: int, replicas: int) -> dict[str, Any]:
    """Keyword arguments of LLaVAModel."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from dip_megatron.compat.layer_specs import specs_of_all_layers

    language = llava_case.config(
        POOL, len(DENSE_FIRST), pp, num_moe_experts=EXPERTS, moe_ffn_hidden_size=24, moe_router_topk=2,
        moe_layer_freq=list(DENSE_FIRST), moe_token_dispatcher_type="alltoall", add_bias_linear=False,
        expert_model_parallel_size=replicas, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.05,
        moe_z_loss_coeff=1e-3,
    )  # fmt: skip
    with specs_of_all_layers():
        spec = get_gpt_decoder_block_spec(language, use_transformer_engine=False)
    return llava_kwargs(POOL, pp) | {
        "language_transformer_config": language, "language_transformer_layer_spec": spec,
        "language_position_embedding_type": "rope",
    }  # fmt: skip


def pool() -> list[dict[str, torch.Tensor]]:
    """All microbatches that sets draw from."""
    shown = zip(POOL.images, cycle(LENGTHS), strict=False)
    return [llava_case.batch(i, images, 1, text=text) for i, (images, text) in enumerate(shown)]


def megatrons(rank: int, world: int, file: Path) -> set[str]:
    """Write to ``file`` each microbatch's loss and gradients by name, as Megatron has them; the names."""
    initialize(world, Ranks(pp=1))
    from megatron.core.enums import ModelType
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from dip_megatron.families.shared.weights import draw_by_name

    model = LLaVAModel(**kwargs_of(1, 1))
    model.model_type = ModelType.encoder_or_decoder
    draw_by_name([model], 7, deviation)
    chunks = wrapped(Wrap(0), [model])
    parts = []
    for microbatch in pool():
        chunks[0].zero_grad_buffer()
        losses = get_forward_backward_func()(
            forward_step_func=llava_case.forward_step, data_iterator=iter([microbatch]), model=chunks,
            num_microbatches=1, seq_length=64, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        ((loss,), gradients, _) = found(losses, chunks)
        parts.append((loss["lm loss"], {name: gradient for (name, _), gradient in gradients.items()}))
    torch.save(parts, file)
    return {name for _, gradients in parts for name in gradients}


@dataclass(frozen=True)
class DrawnSet:
    """What a seed stands for: one of :data:`CUTS`, images in a unit, and which of the pool each replica trains on."""

    cut: int
    unit_size: int
    chosen: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(seed: int) -> DrawnSet:
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, 5))
        chosen = tuple(tuple(rng.integers(0, len(POOL.images), count).tolist()) for _ in range(REPLICAS))
        return DrawnSet(int(rng.integers(len(CUTS))), int(rng.integers(1, 3)), chosen)


@dataclass
class DrawnSetMaker:
    """Plan maker of both replicas: the orders of a random run of all stages, backwards in two, any memory strategies
    that repeat the same exchanges where replicas meet. ``seed`` is set before each iteration."""

    modules: Any
    shapes: Any
    experts: ExpertLayers
    seed: int = 0

    def warm_up(self) -> None:
        pass

    def best(self, request: Any, give: Any) -> PlanSet:
        return self.quick(request)

    def quick(self, request: Any) -> PlanSet:
        drawn = DrawnSet.of(self.seed)
        graphs = tuple(
            DrawnGraphs(self.modules, drawn.unit_size, self.seed).build(loads, request.forward_only, request.training)
            for loads in request.replicas
        )
        rng = np.random.default_rng(self.seed)
        schedules, met = run_at_random(rng, graphs, self.experts)
        graphs = self._with_strategies(rng, graphs, met)
        single = [Schedule(s.orders, np.zeros_like(s.strategy)) for s in schedules]
        shapes = [payloads(g, loads, self.shapes) for g, loads in zip(graphs, request.replicas, strict=True)]
        return make_plan_set(graphs, single, self.experts, lower_bound=0.0, name="drawn", payloads=shapes)

    def _with_strategies(
        self, rng: np.random.Generator, graphs: tuple[OperationGraph, ...], met: list[list[tuple[int, int, int]]]
    ) -> tuple[OperationGraph, ...]:
        again = exchanging_strategies()
        flags = dict(self.experts.modules)

        def layers(g: int, s: int, p: int) -> tuple[bool, ...]:
            """Of a stage's chunk, whether they have experts."""
            graph = graphs[g]
            name, segment = graph.units[int(graph.unit_of[s])].module, graph.segment(s)
            return flags[name][segment][p] if name in flags else (False,) * graph.module(name).layers[segment][p]

        def draw(line: tuple[bool, ...], like: list[str] | None) -> list[str]:
            """A strategy for each layer; where it has experts, one that exchanges again exactly if ``like`` does."""
            return [
                str(rng.choice([
                    name for name in strategy_names()
                    if like is None or not has or (name in again) == (like[i] in again)
                ]))
                for i, has in enumerate(line)
            ]  # fmt: skip

        names = [
            [[draw(layers(g, s, p), None) for p in range(STAGES)] for s in range(graph.virtual_microbatches)]
            for g, graph in enumerate(graphs)
        ]
        for (g, s, p), *others in met:
            for h, t, q in others:
                names[h][t][q] = draw(layers(h, t, q), names[g][s][p])
        return tuple(
            replace(graph, strategies=tuple(tuple((format_strategy(n),) for n in row) for row in lines))
            for graph, lines in zip(graphs, names, strict=True)
        )


class Trainer:
    """This rank's chunks of a cut, and what runs them."""

    def __init__(self, cut: Case, exchange: Any, transport: Any, group: list[int], coupled: Any, deliveries: Any):
        from megatron.core import parallel_state

        from dip_megatron.families.llava.program import LlavaProgram
        from dip_megatron.families.shared.weights import draw_by_name
        from dip_megatron.megatron.coupling import experts_of, meet_in_backwards
        from dip_megatron.megatron.forward_backward import DipForwardBackward, PlanningPolicy
        from dip_megatron.planner.delivery import PlanDelivery
        from dip_megatron.planner.service import PlannerService
        from dip_megatron.runtime.clock import Clock
        from dip_megatron.runtime.executor import Executor

        stage = parallel_state.get_pipeline_model_parallel_rank()
        program = LlavaProgram(
            kwargs_of(STAGES, REPLICAS), {"vision": cut.vision, "language": cut.language}, rank=stage,
            freeze=freeze_arguments(cut),
        )  # fmt: skip
        chunks: Any = program.build_chunks()
        assert program.supports_split
        draw_by_name(chunks, 7, deviation)
        self._chunks = wrapped(Wrap(0, overlap=True), chunks)
        experts = experts_of(self._chunks, program.modules, exchange, coupled)
        meet_in_backwards(self._chunks)
        self._maker = DrawnSetMaker(program.modules, program.shapes, experts)
        service = PlannerService(self._maker, workers=0) if exchange.rank == 0 else None
        clock = Clock(torch.device("cpu"))
        self._step = DipForwardBackward(
            program, Executor(stage, transport, clock), PlanDelivery(deliveries[0], service, coupled=deliveries[1]),
            clock, policy=PlanningPolicy(look_ahead=lambda: False), on_iteration=self._note,
        )  # fmt: skip
        self.ran: set[str] = set()
        self.trains: set[str] = set()

    def _note(self, report: Any, plan: Any, spans: Any) -> None:
        self.ran |= {f"{s.operation.kind.name}" for s in spans}
        self.ran |= {name.split(":")[0] for line in plan.graph.strategies for names in line for name in names}

    def train(self, seed: int, microbatches: list[Any]) -> Any:
        """Losses, gradients and counts of the set of that seed on these microbatches."""
        self._maker.seed = seed
        from dip_megatron.megatron.call import ScheduleCall

        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        losses = self._step(ScheduleCall(
            forward_step_func=llava_case.forward_step, data_iterator=iter(microbatches), model=self._chunks,
            num_microbatches=len(microbatches), forward_only=False,
        ))  # fmt: skip
        losses, gradients, counts = found(losses, self._chunks)
        self.trains |= {name for name, _ in gradients}
        return losses, gradients, counts


class Trainers:
    """Of all cuts, built when they are first drawn, over one transport and one exchange: each is a process group, whose
    threads stay."""

    def __init__(self, file: Path):
        from megatron.core import parallel_state

        from dip_megatron.megatron.coupling import coupled_exchanges, coupled_ranks
        from dip_megatron.megatron.exchange import GlooExchange
        from dip_megatron.runtime.transport import DistributedTransport

        self._group, self._coupled = coupled_ranks()
        pipeline = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self._exchange = GlooExchange(self._group, 900.0)
        self._deliveries = coupled_exchanges(self._group, self._coupled, 900.0)
        self._transport = DistributedTransport(pipeline, stage, torch.device("cpu"), 900.0)
        self._replica = parallel_state.get_data_parallel_rank()
        self._last = stage == STAGES - 1
        self._parts = torch.load(file)
        self._made: dict[int, Trainer] = {}

    def of(self, cut: int) -> Trainer:
        if cut not in self._made:
            self._made[cut] = Trainer(
                CUTS[cut], self._exchange, self._transport, self._group, self._coupled, self._deliveries
            )
        return self._made[cut]

    def fault(self, seed: int, tolerance: float) -> str:
        """Run the set of that seed; what of its losses and gradients isn't the sum of its parts, empty if all is."""
        drawn = DrawnSet.of(seed)
        items, mine = pool(), drawn.chosen[self._replica]
        losses, gradients, _ = self.of(drawn.cut).train(seed, [items[i] for i in mine])
        if len(losses) != (len(mine) if self._last else 0):
            return f"set {seed}: {len(losses)} losses of {len(mine)} microbatches"
        for place, (loss, i) in enumerate(zip(losses, mine, strict=False)):
            if not torch.allclose(loss["lm loss"], self._parts[i][0], rtol=1e-6, atol=1e-6):
                return f"set {seed}: loss {place} is {loss['lm loss'].tolist()}, not {self._parts[i][0].tolist()}"
        everyone = [i for own in drawn.chosen for i in own]
        for (name, _), gradient in gradients.items():
            parts = [self._parts[i][1][name] for i in everyone]
            expected = sum(parts) / len(everyone)
            scale = max(float(part.abs().max()) for part in parts)
            off = float((gradient - expected).abs().max())
            if off > tolerance * scale:
                return f"set {seed}: {name} is off by {off:.2e} of {scale:.2e}"
        return ""

    def seen(self) -> tuple[set[str], dict[int, set[str]]]:
        """Kinds of operations and first names of strategies that ran; what this rank has compared of each cut."""
        ran = {name for trainer in self._made.values() for name in trainer.ran}
        return ran, {cut: trainer.trains for cut, trainer in self._made.items()}


_TRAINERS: dict[Path, Trainers] = {}


def run_sets(rank: int, world: int, file: Path, seeds: list[int], tolerance: float) -> Any:
    """Run the sets of these seeds; what is wrong, the collectives of each, and :meth:`Trainers.seen`."""
    from tests.collectives import recorded

    initialize(world, Ranks(pp=STAGES, ep=REPLICAS))
    if file not in _TRAINERS:
        _TRAINERS[file] = Trainers(file)
    faults, logs = [], []
    for seed in seeds:
        with recorded() as collectives:
            faults.append(_TRAINERS[file].fault(seed, tolerance))
        logs.append(collectives)
    return [fault for fault in faults if fault], logs, *_TRAINERS[file].seen()
