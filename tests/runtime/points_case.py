"""The three-module example with its second encoder on point clouds, for which the package has no name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dip_megatron import Blueprint, Layers, Microbatch, MicrobatchInputs, MultimodalModel, Parallel, Payload, Unit
from examples.three_modules.shapes import AUDIO, ThreeModuleShapes
from tests.examples.three_modules_case import ThreeModuleCase, batches, blueprint, forward_step
from tests.runtime.llava_case import initialize
from tests.runtime.program_case import drawn_run
from tests.runtime.split_case import Drawn

KIND = "point_clouds"


@dataclass(frozen=True)
class PointShapes(ThreeModuleShapes):
    """Counts clouds where the example counts clips."""

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        clouds = dict(load.others).get(KIND, ())
        counted = Microbatch(load.text_tokens, images=load.images, audios=clouds)
        return super().payload(unit, counted, leaves_module=leaves_module)


def describe(asked: Blueprint, parallel: Parallel) -> MultimodalModel:
    """The example's view, its second encoder counted in clouds."""
    from examples.three_modules.family import FAMILY

    model = FAMILY.describe(asked, parallel)
    return replace(model, modules=tuple(replace(m, input=KIND) if m.name == AUDIO else m for m in model.modules))


def program(asked: Blueprint, layers: Layers, rank: int) -> Any:
    """A rank's stages."""
    from examples.three_modules.family import ThreeModuleProgram

    class PointProgram(ThreeModuleProgram):
        def load(self, inputs: MicrobatchInputs) -> Microbatch:
            found = super().load(inputs)
            return Microbatch(found.text_tokens, images=found.images, others={KIND: found.audios})

    made = PointProgram(asked.kwargs["settings"], layers, rank=rank)
    made.shapes = PointShapes(made.shapes.widths, made.shapes.reductions, made.shapes.dtype)
    return made


def points_run(rank: int, world: int, case: ThreeModuleCase, drawn: Drawn) -> Any:
    """See :func:`tests.runtime.program_case.drawn_run`."""
    initialize(world)
    _, asked = blueprint(case, world)
    model = describe(asked, Parallel(1, world, 1, False, False))
    made = program(asked, case.layers, rank)
    return drawn_run(rank, world, made, model, case.unit_size, drawn, forward_step, batches(case))
