"""From a script's model provider to chunks in segments, without a change to the script.

The provider is called once, while constructors of the models DIP knows only note their arguments. Chunks are then built
from those arguments, and returned as a list: ``get_model`` takes it and wraps each chunk as it does virtual stages.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..compat.layer_specs import specs_of_all_layers
from ..config import DipConfig, ModuleConfig
from ..describe.files import ConfigurationError
from ..describe.model import ModulePartition, ModuleShape, MultimodalModel, Partition, even_partition
from ..describe.model.partition import spread
from ..families.family import Blueprint, ModelFamily
from ..planner.partitioning import Given, Placements


class ChunkList(list[torch.nn.Module]):
    """Chunks as get_model takes them: it sets ``model_type`` on what a provider returns."""

    @property
    def model_type(self) -> Any:
        return self[0].model_type

    @model_type.setter
    def model_type(self, value: Any) -> None:
        for chunk in self:
            chunk.model_type = value


def record_blueprint(
    families: Sequence[ModelFamily], provider: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[ModelFamily, Blueprint]:
    """Call ``provider`` and return what it would have built, with its family.

    Raises ConfigurationError if it builds no model of ``families``, or several.
    """
    built: list[tuple[ModelFamily, Blueprint]] = []
    with contextlib.ExitStack() as recorders:
        for family in families:
            recorders.enter_context(_recording(family, built))
        recorders.enter_context(specs_of_all_layers())
        try:
            provider(*args, **kwargs)
        except AttributeError as error:
            if not built:
                raise
            raise ConfigurationError(
                f"the script's model provider uses the model after building it ({error}); DIP builds it in segments "
                f"later. Move that into {built[0][0].model_class.__name__}'s arguments, or behind get_model, or use "
                "--dip-schedule off"
            ) from error
    if len(built) != 1:
        known = ", ".join(family.model_class.__name__ for family in families)
        raise ConfigurationError(
            f"the script's model provider built {len(built)} models that DIP can segment (it knows {known}), "
            "it must be one; add yours as docs/add-a-model.md says, or use --dip-schedule off for this script"
        )
    return built[0]


_OF_A_BUILT_MODEL = (
    "parameters", "named_parameters", "modules", "named_modules", "apply", "requires_grad_", "load_state_dict",
    "register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook",
    "register_full_backward_hook",
)  # fmt: skip


def _not_built(name: str) -> Callable[..., Any]:
    """Instead of a method that would find no parameters and no layers: what a provider freezes, initializes or hooks
    into by it would be lost without a word."""

    def method(*_: Any, **__: Any) -> Any:
        raise AttributeError(f"{name}() of a model without layers")

    return method


@contextlib.contextmanager
def _recording(family: ModelFamily, built: list[tuple[ModelFamily, Blueprint]]) -> Iterator[None]:
    """Within, the family's constructor notes its arguments and builds nothing; its recorded methods likewise."""
    cls: Any = family.model_class
    originals = {name: getattr(cls, name) for name in ("__init__", *family.recorded_methods)}

    def arguments(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        given = dict(inspect.signature(originals[name]).bind(None, *args, **kwargs).arguments)
        del given["self"]
        return given | given.pop("kwargs", {})

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not cls:
            raise ConfigurationError(
                f"the script builds a {type(self).__name__}, which DIP would take for the {cls.__name__} it extends; "
                "add it as a family of its own as docs/add-a-model.md says, or use --dip-schedule off"
            )
        torch.nn.Module.__init__(self)
        blueprint = Blueprint(arguments("__init__", args, kwargs))
        built.append((family, blueprint))
        if family.shows is None:
            self.__dict__.update({name: _not_built(name) for name in _OF_A_BUILT_MODEL})
        else:
            self.__dict__.update(family.shows(blueprint))

    def note_call(name: str) -> Callable[..., None]:
        def called(self: Any, *args: Any, **kwargs: Any) -> None:
            built[-1][1].calls.setdefault(name, {}).update(arguments(name, args, kwargs))

        return called

    cls.__init__ = note
    for name in family.recorded_methods:
        setattr(cls, name, note_call(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(cls, name, original)


def check_placement(model: MultimodalModel, config: DipConfig, family: ModelFamily) -> None:
    """Raises ConfigurationError for a placement that the model can't have."""
    for shape in model.modules:
        own = config.modules.get(shape.name)
        if own is None or own.placement != "replicated":
            continue
        fault = None
        if own.layers is not None or own.segments is not None:
            fault = "all of its layers stand on every rank; leave out layers and segments"
        elif shape is model.modules[-1] or shape.upstream:
            fault = "only encoders can stand on every rank; leave it out"
        elif not family.replicates:
            fault = f"models of family {family.name} can't be built so; leave it out"
        elif model.parallel.coupled > 1:
            fault = "replicas that share experts plan together, which this isn't part of; leave it out"
        if fault is not None:
            raise ConfigurationError(f"--dip-config: modules.{shape.name}.placement: replicated: {fault}")


def placements(model: MultimodalModel, config: DipConfig, family: ModelFamily) -> Placements:
    """Where the partitioner may place modules whose layers the configuration leaves to it: encoders anywhere, if they
    can stand on every rank and it doesn't say."""
    if not family.replicates or model.parallel.coupled > 1:
        return {}
    asked = {
        name: "segmented" if own.layers is not None or own.segments is not None else own.placement
        for name, own in config.modules.items()
    }  # fmt: skip
    return {m.name: asked.get(m.name) or "either" for m in model.modules[:-1] if not m.upstream}


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
        if own is None or not own.gives_layers:
            return None
        if own.placement == "replicated":
            parts.append(ModulePartition.whole(shape.name, shape.layers, model.parallel.pp, own.unit_size))
            continue
        parts.append(ModulePartition(shape.name, _layers(shape, own, model.parallel.pp) or (), own.unit_size))
    partition = Partition(tuple(parts))
    try:
        partition.check(model)
    except ValueError as error:
        raise ConfigurationError(f"--dip-config: {error}") from error
    return partition


def given_parts(model: MultimodalModel, config: DipConfig) -> dict[str, Given]:
    """What the configuration says of modules where it leaves others, or the rest of them, to the partitioner.

    Raises ConfigurationError for layers that aren't the module's.
    """
    found = {}
    for shape in model.modules:
        own = config.modules.get(shape.name)
        if own is None:
            continue
        given = Given(_layers(shape, own, model.parallel.pp), own.unit_size, "unit_size" in own.model_fields_set)
        if given.layers is not None:
            try:
                alone = {shape.name: given}
                parts = (alone.get(part.module, Given()).within(part) for part in even_partition(model).modules)
                Partition(tuple(parts)).check(model)
            except ValueError as error:
                raise ConfigurationError(f"--dip-config: {error}") from error
        if given.layers is not None or given.sized:
            found[shape.name] = given
    return found


def _layers(shape: ModuleShape, own: ModuleConfig, ranks: int) -> tuple[tuple[int, ...], ...] | None:
    """As configured, by segment and rank; None if they are left open."""
    if own.layers is not None:
        return tuple(tuple(line) for line in own.layers)
    return None if own.segments is None else spread(shape.layers, own.segments, ranks)
