"""Pages as model families."""

from __future__ import annotations

from ...describe.model import MultimodalModel, Parallel
from ..family import Blueprint, Layers, ModelFamily
from .page import Page
from .program import CalledProgram


def family_of(page: Page) -> ModelFamily:
    """What hooks take: see :class:`dip_megatron.families.family.ModelFamily`."""

    def describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
        return page.describe(blueprint.kwargs[page.config_name], blueprint.calls.get("freeze", {}), parallel)

    def program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> CalledProgram:
        return CalledProgram(
            page, blueprint.kwargs, layers, rank=rank, micro_batch_size=micro_batch_size,
            freeze=blueprint.calls.get("freeze"),
        )  # fmt: skip

    recorded = ("freeze",) if hasattr(page.model_class, "freeze") else ()
    return ModelFamily(
        page.name, page.model_class, describe, program, page.workload, recorded, replicates=page.replicates
    )  # fmt: skip
