"""Runs under schedules over chunks that mix modalities: whether they can be, and which stages they have."""

from __future__ import annotations

from ..config import DipConfig
from ..describe.files import ConfigurationError
from ..describe.model import ModelError, MultimodalModel, Partition
from ..families.family import Blueprint, ModelFamily
from ..planner.facade import Effort, Setting, choose_chunks
from ..runtime.protocol import ModelProgram
from ..schedulers.common import BaselineError
from ..schedulers.entry import ScheduleEntry
from ..schedulers.static import given_choice

_OTHERS = "use a schedule over segments (dynamic, static, optimus, ...) or --dip-schedule off"


def check_entry(entry: ScheduleEntry, model: MultimodalModel, family: ModelFamily, microbatches: int) -> None:
    """Raise ConfigurationError in one line if this model can't be trained under a schedule."""
    reason = entry.refusal(model, microbatches)
    if reason is None and entry.mixed is not None and family.mixed_program is None:
        if len(model.modules) > 1:
            names = " and ".join(m.name for m in model.modules)
            reason = f"it needs chunks that mix {names}, which the model family {family.name!r} can't build"
        elif entry.mixed.turned:
            reason = f"it needs stages placed in a V, which the model family {family.name!r} can't build"
    if reason is not None:
        raise ConfigurationError(f"--dip-schedule {entry.name}: {reason}; {_OTHERS}")


def configured_choice(entry: ScheduleEntry, model: MultimodalModel, config: DipConfig) -> Partition | None:
    """The stages that the configuration gives, as layers of every module; None if it gives no layers.

    Raises ConfigurationError for what doesn't fit the model or the schedule.
    """
    given = {name: own for name, own in config.modules.items() if own.layers is not None}
    for name, own in config.modules.items():
        if own.unit_size is not None or own.segments is not None:
            raise ConfigurationError(
                f"--dip-config: modules.{name}: {entry.name} works on whole microbatches in stages of any layers; give "
                "layers of every module, or nothing"
            )
    if not given:
        return None
    names = [m.name for m in model.modules]
    if sorted(given) != sorted(names):
        raise ConfigurationError(f"--dip-config: modules: {entry.name} needs layers of {', '.join(names)}")
    layers = {name: tuple(tuple(line) for line in own.layers or ()) for name, own in given.items()}
    try:
        return given_choice(entry.name, model, layers)
    except ModelError as error:
        raise ConfigurationError(f"--dip-config: {error}") from error


def tuned_choice(entry: ScheduleEntry, setting: Setting) -> Partition:
    """The best stages on the setting's batches. Raises ConfigurationError if the schedule can't run them."""
    try:
        chosen = choose_chunks(entry, setting, Effort())
    except BaselineError as error:
        raise ConfigurationError(f"--dip-schedule {entry.name}: {error}; {_OTHERS}") from error
    return chosen


def make_program(
    family: ModelFamily, blueprint: Blueprint, chunks: Partition, *, rank: int, micro_batch_size: int
) -> ModelProgram:
    """One rank's program over the chunks that were chosen."""
    if not chunks.mixed:
        layers = {m.module: m.layers for m in chunks.modules}
        return family.program(blueprint, layers, rank=rank, micro_batch_size=micro_batch_size)
    assert family.mixed_program is not None, "check_entry comes first"
    (part,) = chunks.modules
    return family.mixed_program(blueprint, part, rank=rank, micro_batch_size=micro_batch_size)
