"""A call of Megatron's schedule, as the hook hands it on, and what may stand in one that DIP is to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config


@dataclass(frozen=True, kw_only=True)
class ScheduleCall:
    """The keyword arguments of Megatron's schedules, by their names there and with their defaults.

    The hook parses a call once; nothing behind it sees keyword arguments.
    """

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

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> ScheduleCall:
        """The call with these keyword arguments. Raises ValueError for one that no tested Megatron has."""
        unknown = sorted(set(arguments) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"the schedule is called with {', '.join(unknown)}, which DIP doesn't know; use a Megatron-Core that "
                "it is tested with (README.md, Versions), or --dip-schedule off"
            )
        return cls(**arguments)

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The model, in as many chunks as it has."""
        return as_list(self.model)

    @property
    def iterator(self) -> Iterator[Any] | None:
        """The data iterator; of several, which Megatron gives to chunks, the first chunk's."""
        return as_list(self.data_iterator)[0]  # type: ignore[no-any-return]

    @property
    def weights_changed(self) -> bool:
        """Whether they may have since the last call."""
        return not self.forward_only or bool(self.first_val_step)


def check_call(call: ScheduleCall, built: Sequence[Any], found: Callable[[Any], Any], pipeline: Sequence[int]) -> None:
    """Raises ValueError, the reason in a line, for a call that DIP can't follow.

    ``built`` are the chunks of this rank, in their order; ``found`` gives the one of them that is in a wrapped model,
    or None. ``pipeline`` lists the global ranks of its pipeline.
    """
    theirs = [found(chunk) for chunk in call.chunks]
    own = [chunk for chunk in theirs if chunk is not None]
    if len(theirs) != len(built) or len(own) != len(built):
        raise ValueError(
            f"the schedule is called with {len(theirs)} chunks, of which DIP built {len(own)}; it has built "
            f"{len(built)} for this rank, and runs all of them together: give it what build_model (get_model) returned"
        )
    if any(one is not other for one, other in zip(own, built, strict=True)):
        raise ValueError(
            "the schedule is called with DIP's chunks in another order, or with one of them twice; give them as "
            "build_model (get_model) returned them"
        )
    if call.adjust_tensor_shapes_fn is not None:
        raise ValueError(
            "adjust_tensor_shapes_fn (knowledge distillation) changes what travels between stages, which DIP's plans "
            "don't know; use --dip-schedule off"
        )
    for name, given, group in (
        ("p2p_communicator", call.p2p_communicator, getattr(call.p2p_communicator, "pp_group", None)),
        ("pg_collection", call.pg_collection, getattr(call.pg_collection, "pp", None)),
    ):
        if given is None:
            continue
        if group is None:
            raise ValueError(
                f"{name} is a {type(given).__name__} without one pipeline group: DIP schedules one pipeline, "
                "not several grids; use --dip-schedule off"
            )
        ranks = list(dist.get_process_group_ranks(group))
        if ranks != list(pipeline):
            raise ValueError(
                f"{name} is among ranks {ranks}, the model's pipeline among {list(pipeline)}; use --dip-schedule off"
            )


def check_functions(call: ScheduleCall) -> None:
    """Raises ValueError if what reduces gradients over replicas is not where schedules look for it."""
    if get_model_config(call.chunks[0]).finalize_model_grads_func is None:
        raise ValueError(
            "the loop has given DIP's chunks no finalize_model_grads_func, without which replicas would train apart; "
            "if a package replaces what the loop or DIP puts there, leave that out, or use --dip-schedule off"
        )


def as_list(value: Any) -> list[Any]:
    """What schedules take as one or as a list of several."""
    return value if isinstance(value, list) else [value]
