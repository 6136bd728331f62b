"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model.

What is public, and what is promised of it, stands in ``docs/api.md``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .api import DEPRECATED, HOMES
from .deprecation import moved

if TYPE_CHECKING:
    from .core import ModalityModule as ModalityModule
    from .core import Payload as Payload
    from .core import Plan as Plan
    from .core import Schedule as Schedule
    from .core import StageGraph as StageGraph
    from .core import StageKey as StageKey
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
    from .runtime.protocol import StageProgram as StageProgram
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


def install(families: Sequence[ModelFamily] = ()) -> None:
    """Hook DIP into ``megatron.training``: adds the argument group ``dip`` and acts only where ``--dip-schedule`` asks.

    Call it before Megatron parses its arguments. ``families`` are models of yours that DIP shall segment
    (docs/add-a-model.md); calling it again only adds families. Raises ImportError if ``megatron.training`` can't be
    imported, ValueError if a model class has a family already.
    """
    from .megatron.hooks import Hooks, warn_of_version

    hooks = Hooks.installed()
    if hooks is not None:
        hooks.add_families(families)
        return
    hooks = Hooks()
    hooks.add_families(families)
    warn_of_version(hooks.install())


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
