"""A tiny text-to-video model on real processes: Megatron's own PP1 and ours on the same weights and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dip_megatron.describe.model import Parallel
from tests.runtime.llava_case import initialize
from tests.runtime.program_case import drawn_run, plain_run, split_dimension, tiny_config
from tests.runtime.split_case import Drawn

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
    trains: str | None = None


LOSSES = ("per token", "sum and count", "mean")


def config(case: T2vCase, layers: int, hidden: int, pp: int, **more: Any) -> Any:
    if case.recompute:
        more |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return tiny_config(
        layers, hidden, pp, tensor_model_parallel_size=case.tensor_parallel,
        calculate_per_token_loss=case.loss == "per token", **more,
    )  # fmt: skip


def arguments(case: T2vCase, pp: int) -> dict[str, Any]:
    """Keyword arguments of TextToVideoModel."""
    from dip_megatron.families.t2v.diffusion import diffusion_layer_spec
    from dip_megatron.families.t2v.text_encoder import text_layer_spec

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
    from dip_megatron.families.t2v.program import TextToVideoModel

    model = TextToVideoModel(**arguments(case, 1))
    model.freeze(**freeze_arguments(case))
    losses, grads = plain_run(model, partial(forward_step, case.loss), batches(case), case.trains)
    return losses, grads, {name: split_dimension(p) for name, p in model.named_parameters()}


def dip_run(rank: int, world: int, case: T2vCase, drawn: Drawn, forward_only: bool = False) -> Any:
    """See :func:`tests.runtime.program_case.drawn_run`."""
    initialize(world)
    from dip_megatron.families.describe import describe_t2v
    from dip_megatron.families.t2v.program import T2vProgram

    kwargs, frozen = arguments(case, world), freeze_arguments(case)
    program = T2vProgram(kwargs, {"language": case.language, "diffusion": case.diffusion}, rank=rank, freeze=frozen)
    model = describe_t2v(kwargs, frozen, Parallel(1, world, 1, False, False))
    return drawn_run(
        rank, world, program, model, case.unit_size, drawn, partial(forward_step, case.loss), batches(case),
        forward_only, case.trains,
    )  # fmt: skip
