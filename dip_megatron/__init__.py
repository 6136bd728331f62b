"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model.

What is public, and what is promised of it, stands in ``docs/api.md``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .api import DEPRECATED, HOMES
from .deprecation import moved

if TYPE_CHECKING:
    import torch

    from .core import ModalityModule as ModalityModule
    from .core import Operation as Operation
    from .core import OperationGraph as OperationGraph
    from .core import Payload as Payload
    from .core import Plan as Plan
    from .core import Schedule as Schedule
    from .core import TensorSpec as TensorSpec
    from .core import Unit as Unit
    from .core.files import PlanFileError as PlanFileError
    from .core.files import read_plans as read_plans
    from .core.files import write_plans as write_plans
    from .core.simulate import simulate as simulate
    from .core.verify import PlanError as PlanError
    from .core.verify import verify as verify
    from .describe.cost import build_graph as build_graph
    from .describe.cost import load_cluster as load_cluster
    from .describe.files import ConfigurationError as ConfigurationError
    from .describe.model import EVERY_PART as EVERY_PART
    from .describe.model import FeatureEmbedding as FeatureEmbedding
    from .describe.model import LanguageHead as LanguageHead
    from .describe.model import LatentEmbedding as LatentEmbedding
    from .describe.model import LatentHead as LatentHead
    from .describe.model import ModuleShape as ModuleShape
    from .describe.model import MultimodalModel as MultimodalModel
    from .describe.model import Packing as Packing
    from .describe.model import Parallel as Parallel
    from .describe.model import Partition as Partition
    from .describe.model import PatchEmbedding as PatchEmbedding
    from .describe.model import Projector as Projector
    from .describe.model import TokenEmbedding as TokenEmbedding
    from .describe.model import TransformerLayer as TransformerLayer
    from .describe.model import even_partition as even_partition
    from .describe.model import load_model as load_model
    from .describe.partition import read_partition as read_partition
    from .describe.workload import Clip as Clip
    from .describe.workload import Microbatch as Microbatch
    from .describe.workload import load_workload as load_workload
    from .families.describe import layer_shape as layer_shape
    from .families.family import Blueprint as Blueprint
    from .families.family import Layers as Layers
    from .families.family import ModelFamily as ModelFamily
    from .families.shared.layout import segment_config as segment_config
    from .families.shared.packing import pack as pack
    from .families.shared.parts import applied as applied
    from .families.shared.parts import encoder_layer_spec as encoder_layer_spec
    from .families.shared.parts import linear as linear
    from .families.shared.parts import projector as projector
    from .families.shared.sdpa import with_sdpa as with_sdpa
    from .families.shared.segmented import ModelPart as ModelPart
    from .families.shared.segmented import SegmentedProgram as SegmentedProgram
    from .families.shared.segmented import bound as bound
    from .families.shared.segmented import dtype_name as dtype_name
    from .families.shared.segmented import unwrapped as unwrapped
    from .families.shared.weights import draw_by_name as draw_by_name
    from .families.t2v.diffusion import patchify as patchify
    from .families.t2v.text_encoder import text_layer_spec as text_layer_spec
    from .megatron.cpu import CPU_FLAGS as CPU_FLAGS
    from .megatron.cpu import install_cpu_platform as install_cpu_platform
    from .runtime.protocol import Inputs as Inputs
    from .runtime.protocol import MicrobatchInputs as MicrobatchInputs
    from .runtime.protocol import ModelProgram as ModelProgram
    from .runtime.protocol import SamplePacking as SamplePacking
    from .runtime.protocol import Tensors as Tensors
    from .schedulers.common import BaselineError as BaselineError
    from .schedulers.entry import Found as Found
    from .schedulers.entry import LeastRecompute as LeastRecompute
    from .schedulers.entry import MixedChunks as MixedChunks
    from .schedulers.entry import Problem as Problem
    from .schedulers.entry import ScheduleEntry as ScheduleEntry
    from .schedulers.registry import find_schedule as find_schedule
    from .schedulers.registry import register_schedule as register_schedule
    from .schedulers.registry import schedule_names as schedule_names

__version__ = "0.1.0"
__all__ = [*HOMES, "__version__"]


def install(families: Sequence[ModelFamily] = (), samples: SamplePacking | None = None) -> None:
    """Hook DIP into Megatron-Core's schedules and into the training loops it knows; it acts only where it is asked to.

    Call it before the loop parses its arguments or builds its model; modules may be imported before or after. With
    ``megatron.training`` it adds the argument group ``dip``, other loops ask through the environment or
    :func:`build_model`. ``families`` are models of yours that DIP shall segment (docs/add-a-model.md); calling it again
    only adds families. ``samples`` says how the loop packs samples into microbatches, for ``resample``
    (docs/balance.md). Raises ImportError if Megatron-Core can't be imported, ValueError if a model class has a family
    already.
    """
    from .megatron.hooks import Hooks

    runs = Hooks.installed().runs
    runs.add_families(families)
    if samples is not None:
        runs.pack_samples(samples)


def build_model(
    provider: Callable[..., torch.nn.Module], *, micro_batch_size: int, num_microbatches: int, **settings: Any
) -> list[torch.nn.Module]:
    """Build this pipeline rank's chunks of a model for a loop that DIP doesn't know (docs/any-loop.md).

    ``provider(pre_process=..., post_process=...)`` builds the model as Megatron's providers do. Wrap each chunk as a
    stage of an interleaved pipeline, and give all of them to Megatron-Core's schedule; what
    ``get_forward_backward_func()`` returns runs them under DIP's plans. ``num_microbatches`` of an iteration and data
    parallel rank is a guess by which the model is cut; iterations may have any number.

    ``settings`` are those of the YAML file by their names (``schedule="dynamic"``, ``search_budget=0.1``, ...), over
    the environment and over the file at ``config``; and of the loop: ``seed``, ``log_interval`` (iterations a line of
    the log), ``read_ahead`` (whether the data iterator may be read while an iteration trains), ``another_follows()``
    (whether the iteration about to run is followed by another; asked only with ``read_ahead``), ``sequence_parallel``,
    ``distributed_optimizer``, and ``weights_by_tokens`` (whether losses and gradients of all replicas are added up and
    divided by their tokens; ``balance="free"`` and ``resample`` need it) and ``samples``, a :class:`SamplePacking` (for
    ``resample``). With ``schedule`` off, or with one pipeline rank and
    ``balance`` off, it returns the provider's stage.

    Raises ConfigurationError, in one line, for settings or a model that DIP can't take, RuntimeError before Megatron's
    parallel state is initialized.
    """
    from .megatron.any_loop import build

    return build(provider, micro_batch_size=micro_batch_size, num_microbatches=num_microbatches, **settings)


def __getattr__(name: str) -> Any:
    """A public name, loaded now."""
    if name in DEPRECATED:
        return moved(name, DEPRECATED, __getattr__)
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
