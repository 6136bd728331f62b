"""What may stand in a call of a schedule that DIP is to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config


@dataclass(kw_only=True)
class ScheduleCall:
    """The keyword arguments of Megatron's schedules, by their names there and with their defaults."""

    forward_step_func: Callable[..., Any]
    data_iterator: Iterator[Any] | list[Iterator[Any]] | None
    model: torch.nn.Module | list[torch.nn.Module]
    num_microbatches: int
    seq_length: int | None = None
    micro_batch_size: int | None = None
    decoder_seq_length: int | None = None
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None
    p2p_communicator: Any = None
    pg_collection: Any = None
    force_all_reduce: bool | None = False

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The model, in as many chunks as it has."""
        return self.model if isinstance(self.model, list) else [self.model]

    @property
    def weights_changed(self) -> bool:
        """Whether they may have since the last call."""
        return not self.forward_only or bool(self.first_val_step)


def check_call(
    arguments: Mapping[str, Any], built: Sequence[Any], found: Callable[[Any], Any], pipeline: Sequence[int]
) -> None:
    """Raises ValueError, the reason in a line, for keyword arguments of Megatron's schedules that DIP can't follow.

    ``built`` are the chunks of this rank, in their order; ``found`` gives the one of them that is in a wrapped model,
    or None. ``pipeline`` lists the global ranks of its pipeline.
    """
    given = [found(chunk) for chunk in as_list(arguments["model"])]
    own = [chunk for chunk in given if chunk is not None]
    if len(given) != len(built) or len(own) != len(built):
        raise ValueError(
            f"the schedule is called with {len(given)} chunks, of which DIP built {len(own)}; it has built "
            f"{len(built)} for this rank, and runs all of them together: give it what build_model (get_model) returned"
        )
    if any(one is not other for one, other in zip(own, built, strict=True)):
        raise ValueError(
            "the schedule is called with DIP's chunks in another order, or with one of them twice; give them as "
            "build_model (get_model) returned them"
        )
    if arguments.get("adjust_tensor_shapes_fn") is not None:
        raise ValueError(
            "adjust_tensor_shapes_fn (knowledge distillation) changes what travels between stages, which DIP's plans "
            "don't know; use --dip-schedule off"
        )
    for name, group in (
        ("p2p_communicator", getattr(arguments.get("p2p_communicator"), "pp_group", None)),
        ("pg_collection", getattr(arguments.get("pg_collection"), "pp", None)),
    ):
        if arguments.get(name) is None:
            continue
        if group is None:
            raise ValueError(
                f"{name} is a {type(arguments[name]).__name__} without one pipeline group: DIP schedules one pipeline, "
                "not several grids; use --dip-schedule off"
            )
        ranks = list(dist.get_process_group_ranks(group))
        if ranks != list(pipeline):
            raise ValueError(
                f"{name} is among ranks {ranks}, the model's pipeline among {list(pipeline)}; use --dip-schedule off"
            )


def check_functions(model: Any) -> None:
    """Raises ValueError if what reduces gradients over replicas is not where schedules look for it."""
    if get_model_config(as_list(model)[0]).finalize_model_grads_func is None:
        raise ValueError(
            "the loop has given DIP's chunks no finalize_model_grads_func, without which replicas would train apart; "
            "if a package replaces what the loop or DIP puts there, leave that out, or use --dip-schedule off"
        )


def as_list(value: Any) -> list[Any]:
    """What schedules take as one or as a list of several."""
    return value if isinstance(value, list) else [value]
