"""From a script's model provider to chunks in segments, without a change to the script.

The provider is called once, while constructors of the models DIP knows only note their arguments. Chunks are then built
from those arguments, and returned as a list: ``get_model`` takes it and wraps each chunk as it does virtual stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel

from ..config import ConfigurationError, DipConfig
from ..model import ModulePartition, MultimodalModel, Partition
from ..model.partition import spread


@dataclass
class Blueprint:
    """What a provider asked for: the constructor's keyword arguments and what it froze."""

    kwargs: dict[str, Any]
    freeze: dict[str, bool] = field(default_factory=dict)


class ChunkList(list[torch.nn.Module]):
    """Chunks as get_model takes them: it sets ``model_type`` on what a provider returns."""

    @property
    def model_type(self) -> Any:
        return self[0].model_type

    @model_type.setter
    def model_type(self, value: Any) -> None:
        for chunk in self:
            chunk.model_type = value


def record_blueprint(provider: Callable[..., Any], *args: Any, **kwargs: Any) -> Blueprint:
    """Call ``provider`` and return what it would have built. Raises ConfigurationError if it builds no LLaVAModel."""
    blueprints: list[Blueprint] = []
    with _recording(blueprints):
        try:
            provider(*args, **kwargs)
        except AttributeError as error:
            if not blueprints:
                raise
            raise ConfigurationError(
                f"the script's model provider uses the model after building it ({error}); DIP builds it in segments "
                "later. Move that into LLaVAModel's arguments, or use --dip-schedule off"
            ) from error
    if len(blueprints) != 1:
        raise ConfigurationError(
            f"the script's model provider built {len(blueprints)} models that DIP can segment (it knows LLaVAModel), "
            "it must be one; use --dip-schedule off for this script"
        )
    return blueprints[0]


@contextlib.contextmanager
def _recording(blueprints: list[Blueprint]) -> Iterator[None]:
    """Within, ``LLaVAModel(...)`` notes its arguments and builds nothing; ``freeze(...)`` is noted too."""
    construct, freeze = LLaVAModel.__init__, LLaVAModel.freeze

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.Module.__init__(self)
        names = construct.__code__.co_varnames[1 : construct.__code__.co_argcount]
        given = dict(zip(names, args, strict=False)) | kwargs
        blueprints.append(Blueprint(given))

    def note_freeze(self: Any, *args: Any, **kwargs: Any) -> None:
        names = freeze.__code__.co_varnames[1 : freeze.__code__.co_argcount]
        blueprints[-1].freeze.update(dict(zip(names, args, strict=False)) | kwargs)

    LLaVAModel.__init__, LLaVAModel.freeze = note, note_freeze
    try:
        yield
    finally:
        LLaVAModel.__init__, LLaVAModel.freeze = construct, freeze


def configured_partition(model: MultimodalModel, config: DipConfig) -> Partition | None:
    """The partition that the configuration fully gives; None if a module's layers are left to the partitioner.

    Raises ConfigurationError for names or numbers that don't fit the model.
    """
    unknown = set(config.modules) - {m.name for m in model.modules}
    if unknown:
        raise ConfigurationError(
            f"--dip-config: modules: no {sorted(unknown)[0]!r} in this model; it has "
            f"{', '.join(m.name for m in model.modules)}"
        )
    parts = []
    for shape in model.modules:
        own = config.modules.get(shape.name)
        if own is None or (own.layers is None and own.segments is None):
            return None
        if own.layers is not None:
            layers = tuple(tuple(line) for line in own.layers)
        else:
            layers = spread(shape.layers, own.segments or 1, model.parallel.pp)
        parts.append(ModulePartition(shape.name, layers, own.unit_size))
    partition = Partition(tuple(parts))
    try:
        partition.check(model)
    except ValueError as error:
        raise ConfigurationError(f"--dip-config: {error}") from error
    return partition
