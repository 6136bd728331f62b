"""A tiny text-to-video model on real processes: Megatron's own PP1 and ours on the same weights and batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dip_megatron.model import MultimodalModel, Parallel
from dip_megatron.planner.feed import PlanFeed
from dip_megatron.planner.live import without_training
from dip_megatron.planner.service import PlannerService
from dip_megatron.schedule import Kind, ModalityModule, StageGraph
from dip_megatron.workload import Microbatch, make_units
from tests.runtime.llava_case import finalize_without_ddp, global_name, gradients, initialize
from tests.runtime.split_case import Drawn, DrawnMaker

VOCABULARY = 64
CHANNELS = 3
PATCH = (1, 2, 2)

SHORT, LONG, WIDE, TALL = (3, 1, 4, 4), (11, 3, 4, 4), (2, 1, 2, 6), (7, 2, 6, 2)
"""Clips as tokens of the prompt, and frames, height and width of the latents."""


@dataclass(frozen=True)
class T2vCase:
    """What to train: clips of each microbatch, layers per chunk, clips of a sub-microbatch, Megatron options."""

    clips: tuple[tuple[tuple[int, int, int, int], ...], ...]
    language: tuple[tuple[int, ...], ...] = ((1, 1),)
    diffusion: tuple[tuple[int, ...], ...] = ((1, 1),)
    unit_size: dict[str, int | None] = field(default_factory=lambda: {"language": None, "diffusion": 1})
    freeze: tuple[str, ...] = ()
    recompute: bool = False
    loss: str = "per token"
    tensor_parallel: int = 1


LOSSES = ("per token", "sum and count", "mean")


def config(case: T2vCase, layers: int, hidden: int, pp: int, **more: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    if case.recompute:
        more |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=4, use_cpu_initialization=True,
        pipeline_model_parallel_size=pp, tensor_model_parallel_size=case.tensor_parallel,
        params_dtype=torch.float64, pipeline_dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0,
        calculate_per_token_loss=case.loss == "per token", deallocate_pipeline_outputs=True,
        masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, apply_rope_fusion=False, **more,
    )  # fmt: skip


def arguments(case: T2vCase, pp: int) -> dict[str, Any]:
    """Keyword arguments of TextToVideoModel."""
    from dip_megatron.models.diffusion import diffusion_layer_spec
    from dip_megatron.models.text_encoder import text_layer_spec

    text, diffusion = (sum(map(sum, lines)) for lines in (case.language, case.diffusion))
    return {
        "text_config": config(case, text, 24, pp, ffn_hidden_size=40, num_query_groups=2),
        "text_layer_spec": text_layer_spec(),
        "vocabulary": VOCABULARY,
        "diffusion_config": config(case, diffusion, 32, pp, ffn_hidden_size=48),
        "diffusion_layer_spec": diffusion_layer_spec(),
        "latent_channels": CHANNELS,
        "patch": PATCH,
        "compression": (4, 8, 8),
        "largest_grid": (3, 3, 3),
    }


def freeze_arguments(case: T2vCase) -> dict[str, bool]:
    return {f"freeze_{name}": name in case.freeze for name in ("text_encoder", "text_projection")}


def batches(case: T2vCase, seed: int = 0) -> list[dict[str, Any]]:
    out = []
    for i, clips in enumerate(case.clips):
        draw = torch.Generator().manual_seed(100 * seed + i)
        sizes = [(CHANNELS, *clip[1:]) for clip in clips]
        out.append({
            "tokens": torch.randint(0, VOCABULARY, (sum(clip[0] for clip in clips),), generator=draw),
            "prompt_lengths": [clip[0] for clip in clips],
            "latents": [torch.randn(size, generator=draw) for size in sizes],
            "timesteps": torch.rand(len(clips), generator=draw),
            "noise": [torch.randn(size, generator=draw) for size in sizes],
        })  # fmt: skip
    return out


def forward_step(kind: str, data_iterator: Any, model: Any) -> Any:
    """A pretrain script's, with a loss function of each kind that Megatron knows."""
    losses = model(**next(data_iterator))

    def loss_func(losses: torch.Tensor) -> Any:
        total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
        report = torch.stack([total.detach().clone(), count.float()])
        if kind == "mean":
            return losses.mean(), {"loss": losses.detach().mean()}
        return total, count, {"loss": report}

    return losses, partial(loss_func)


def reference(rank: int, world: int, case: T2vCase) -> Any:
    """Losses and gradients of the whole model under Megatron's schedule without a pipeline, and how they are split."""
    initialize(1, case.tensor_parallel)
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from dip_megatron.models.t2v import TextToVideoModel

    model = TextToVideoModel(**arguments(case, 1))
    model.freeze(**freeze_arguments(case))
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_without_ddp
    seed([model])
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, case.loss), data_iterator=iter(batches(case)), model=[model],
        num_microbatches=len(case.clips), seq_length=1, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    splits = {name: split_dimension(p) for name, p in model.named_parameters()}
    return losses, gradients([model]), splits


def split_dimension(parameter: torch.nn.Parameter) -> int | None:
    """Along which dimension tensor parallelism splits it."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def seed(models: list[torch.nn.Module]) -> None:
    """The same weights whatever the partition, each rank its shards of them.

    In double precision: in single, sums over parts of a microbatch differ from those over the whole by a few millionths
    where gradients are small sums of large terms, and an error as small could hide there.
    """
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for model in models:
        model.double()  # Megatron's norms are built in single precision
        for local, parameter in model.named_parameters():
            name, shape, split = global_name(model, local), list(parameter.shape), split_dimension(parameter)
            if split is not None:
                shape[split] *= size
            drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64)
            weight *= 0.2 if parameter.dim() > 1 else 0.05
            weight += 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.copy_(weight if split is None else weight.chunk(size, split)[rank])


@dataclass(frozen=True)
class DrawnClipGraphs:
    """Graphs with drawn durations, so that plans come in orders no cost model would think of."""

    model: MultimodalModel
    modules: tuple[ModalityModule, ...]
    unit_size: dict[str, int | None]
    seed: int = 0

    def build(self, loads: tuple[Microbatch, ...], forward_only: bool) -> StageGraph:
        units = make_units(self.model, loads, self.unit_size)
        ranks, segments = len(self.modules[0].layers[0]), {m.name: m.segments for m in self.modules}
        rows = sum(segments[u.module] for u in units)
        draw = np.random.default_rng(self.seed).uniform(0.2, 2.0, (5, 1, rows, ranks))
        graph = StageGraph(
            ranks, self.modules, units, draw[0], draw[1], draw[2], draw[1] + draw[2], draw[3], draw[4],
            np.full(rows, 0.05), np.zeros(ranks), np.full(ranks, np.inf),
        )  # fmt: skip
        return without_training(graph) if forward_only else graph


def dip_run(rank: int, world: int, case: T2vCase, drawn: Drawn, forward_only: bool = False) -> Any:
    """Losses of one iteration, gradients on this rank, and the kinds of operations that it ran, by module."""
    initialize(world)
    from dip_megatron.megatron.describe import describe_t2v
    from dip_megatron.megatron.exchange import GlooExchange
    from dip_megatron.megatron.forward_backward import DipForwardBackward
    from dip_megatron.models.t2v import T2vProgram
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.transport import DistributedTransport

    kwargs, frozen = arguments(case, world), freeze_arguments(case)
    program = T2vProgram(kwargs, {"language": case.language, "diffusion": case.diffusion}, rank=rank, freeze=frozen)
    chunks = program.build_chunks()
    assert program.supports_split
    seed(chunks)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_without_ddp
    ranks = list(range(world))
    clock = Clock(torch.device("cpu"))
    model = describe_t2v(kwargs, frozen, Parallel(1, world, 1, False, False))
    graphs = DrawnClipGraphs(model, program.modules, case.unit_size, drawn.seed)
    maker = DrawnMaker(graphs, program.shapes, drawn)
    feed = PlanFeed(GlooExchange(ranks, 60.0), PlannerService(maker, workers=0) if rank == 0 else None)
    transport = DistributedTransport(ranks, rank, torch.device("cpu"), 60.0)
    ran: list[tuple[str, Kind]] = []
    step = DipForwardBackward(
        program, Executor(rank, transport, clock), feed, clock,
        on_iteration=lambda report, plan, spans: ran.extend((s.key.module, s.key.kind) for s in spans),
    )  # fmt: skip
    losses = step(
        forward_step_func=partial(forward_step, case.loss), data_iterator=iter(batches(case)), model=chunks,
        num_microbatches=len(case.clips), forward_only=forward_only,
    )  # fmt: skip
    feed.close()
    return [losses], gradients(chunks), ran
