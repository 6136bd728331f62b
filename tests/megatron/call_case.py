"""Calls of the schedule by a loop of its own, for processes of a team: under DIP and under Megatron-Core's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.runtime.llava_case import initialize

MICROBATCHES = 6
SEGMENTS = {"language": {"layers": [[1, 1], [1, 1]]}}


class Loop:
    """A model, as DIP builds it or as Megatron's stages are, and calls of the schedule with it."""

    def __init__(self, world: int, *, dip: bool, seed: int = 1, **settings: Any):
        initialize(world)
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        import dip_megatron
        from dip_megatron.families.shared.weights import draw_by_name
        from examples.any_loop import train

        if dip:
            stages = dip_megatron.build_model(
                train.provide, micro_batch_size=1, num_microbatches=MICROBATCHES, schedule="dynamic", planner_workers=0,
                **{"modules": SEGMENTS, **settings},
            )  # fmt: skip
        else:
            stages = [train.provide(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())]
        draw_by_name(stages, seed, lambda name, parameter: 0.05 if parameter.dim() > 1 else None)
        reduction = DistributedDataParallelConfig(overlap_grad_reduce=False)
        self.chunks = [DistributedDataParallel(stage.config, reduction, stage) for stage in stages]
        for stage in stages:
            stage.config.finalize_model_grads_func = finalize_model_grads
        self.train = train

    def call(self, data: Any, step: Any = None, *, count: int = MICROBATCHES, **arguments: Any) -> list[Any]:
        """The schedule; every stage of the model unless ``model`` is given."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        given = {"model": self.chunks, "forward_only": False} | arguments
        losses: list[Any] = get_forward_backward_func()(
            forward_step_func=step or self.train.forward_step, data_iterator=data, num_microbatches=count,
            seq_length=self.train.LENGTH, micro_batch_size=1, **given,
        )  # fmt: skip
        return losses

    def trained(self, data: Any, step: Any = None, **arguments: Any) -> dict[str, Any]:
        """An iteration and a step of gradient descent: losses on the last rank, and the gradients' norm. Later losses
        tell where the gradients pointed."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        losses = self.call(data, step, **arguments)
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        norm = torch.stack([(p.main_grad.double() ** 2).sum() for p in parameters]).sum()
        dist.all_reduce(norm)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.main_grad
        return {"losses": losses, "norm": float(norm) ** 0.5}


def of_three_values(losses: torch.Tensor) -> Any:
    """A sum, the number of tokens in it, and both to report."""
    tokens = torch.tensor(losses.numel(), dtype=torch.int)
    total = losses.float().sum()
    return total, tokens, {"loss": torch.stack([total.detach(), tokens.float()])}


def logits_of(output: torch.Tensor, non_loss_data: bool = False) -> Any:
    """No loss, but what the model says."""
    assert non_loss_data
    return output.detach().clone()


def without_labels(data_iterator: Any, model: Any) -> Any:
    """Inference: the model is called without labels."""
    tokens = next(data_iterator)["tokens"]
    return model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None), logits_of


def in_pairs(data: Iterator[Any]) -> Iterator[Any]:
    """Microbatches of two samples: each beside itself read backwards."""
    for item in data:
        yield {name: torch.cat([ids, ids.flip(1)]) for name, ids in item.items()}


def calls(rank: int, world: int, dip: bool) -> dict[str, Any]:
    """What each call of one loop gives, in the order in which they are made."""
    loop = Loop(world, dip=dip)
    data, other = loop.train.microbatches(0), loop.train.microbatches(1)

    def three(data_iterator: Iterator[Any], model: Any) -> Any:
        return loop.train.forward_step(data_iterator, model)[0], of_three_values

    return {
        "two values": loop.trained(data),
        "an evaluation of fewer microbatches": loop.call(other, count=2, forward_only=True),
        "three values": loop.trained(data, three),
        "an evaluation of more microbatches": loop.call(other, three, count=9, forward_only=True),
        "inference": loop.call(other, without_labels, count=3, forward_only=True, collect_non_loss_data=True),
        "an evaluation of two samples a microbatch": loop.call(in_pairs(other), count=2, forward_only=True),
        "two samples a microbatch": loop.trained(in_pairs(data), count=4),
        "after inference": loop.trained(data),
    }


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def refusals(rank: int, world: int) -> dict[str, str]:
    """What is said of calls that DIP can't follow; and that the next call trains all the same."""
    loop = Loop(world, dip=True, read_ahead=True)
    another = Loop(world, dip=False, seed=2)
    data = loop.train.microbatches(0)
    first = loop.trained(data)["norm"]
    one, two = loop.chunks
    said = {
        "order": _said(lambda: loop.call(data, model=[two, one])),
        "twice": _said(lambda: loop.call(data, model=[one, one])),
        "part": _said(lambda: loop.call(data, model=[one])),
        "mixed": _said(lambda: loop.call(data, model=[one, another.chunks[0]])),
        "shared by two models": _said(lambda: another.trained(data)),
    }
    # With data of its own the other model trains, under Megatron's schedule.
    plain = another.trained(loop.train.microbatches(3))
    assert plain["norm"] > 0
    assert 0 < loop.trained(data)["norm"] != first
    return said


def nested(rank: int, world: int, own: bool) -> None:
    """A forward_step that calls the schedule: of the same model, or of another."""
    loop = Loop(world, dip=True)
    another = loop if own else Loop(world, dip=False)

    def step(data_iterator: Iterator[Any], model: Any) -> Any:
        another.call(data_iterator, count=2, forward_only=True)
        return loop.train.forward_step(data_iterator, model)

    loop.trained(loop.train.microbatches(0), step)


def replaced_afterwards(rank: int, world: int) -> None:
    """Another package puts Megatron-Core's own function back, after DIP has been installed."""
    loop = Loop(world, dip=True, modules={"language": {"layers": [[2, 2]]}})
    from megatron.core import pipeline_parallel

    ours: Any = pipeline_parallel.get_forward_backward_func
    pipeline_parallel.get_forward_backward_func = ours.__wrapped__
    loop.trained(loop.train.microbatches(0))


def unfinished(rank: int, world: int) -> str:
    """A loop that finalizes gradients, whose function has not reached the chunks."""
    loop = Loop(world, dip=True)
    from dip_megatron.megatron.hooks import Hooks

    session = Hooks.installed().runs.session
    assert session is not None
    session._loop.settings = replace(session._loop.settings, finalizes=True)
    for chunk in loop.chunks:
        chunk.config.finalize_model_grads_func = None
    data = loop.train.microbatches(0)
    assert _said(lambda: loop.call(data, count=2, forward_only=True)) == ""
    return _said(lambda: loop.call(data))
