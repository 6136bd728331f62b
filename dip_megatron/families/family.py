"""A kind of model that DIP can segment: which class a script builds, what it is for the planner, how it runs in stages.

``docs/add-a-model.md`` walks through adding one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..describe.model import ModulePartition, MultimodalModel, Parallel
from ..runtime.protocol import ModelProgram

Layers = Mapping[str, tuple[tuple[int, ...], ...]]
"""Layers of each module, ``[segment][rank]``."""


@dataclass
class Blueprint:
    """What a script's model provider asked for: the constructor's arguments by name, and those of each recorded method
    (:attr:`ModelFamily.recorded_methods`) that it called on the new model."""

    kwargs: dict[str, Any]
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)


class MakeProgram(Protocol):
    """Makes the stage program of one rank. ``layers`` come from the partition."""

    def __call__(self, blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> ModelProgram: ...


class MakeMixedProgram(Protocol):
    """Makes the stage program of one rank's ``stages`` that mix modules."""

    def __call__(
        self, blueprint: Blueprint, stages: ModulePartition, *, rank: int, micro_batch_size: int
    ) -> ModelProgram: ...


@dataclass(frozen=True)
class ModelFamily:
    """``model_class`` is what scripts construct. ``describe`` gives the planner's view of a blueprint, ``program`` its
    stages; both raise ValueError for what can't be segmented. ``workload`` names the mix (``configs/workloads``) by
    which the partitioner judges before the first batch is read. ``mixed_program`` None: its chunks can't mix modules,
    as Megatron's own schedules and zero bubble need them of a model of several. ``replicates``: its program can hold
    modules that feed others whole on every rank. ``shows``: attributes, by name, of a model that isn't built yet, for
    providers that look at it after building it; what they do then, ``build_chunks`` must do."""

    name: str
    model_class: type[torch.nn.Module]
    describe: Callable[[Blueprint, Parallel], MultimodalModel]
    program: MakeProgram
    workload: str
    recorded_methods: tuple[str, ...] = ()
    mixed_program: MakeMixedProgram | None = None
    replicates: bool = False
    shows: Callable[[Blueprint], Mapping[str, Any]] | None = None
