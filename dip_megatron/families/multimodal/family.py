"""Pages as model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...describe.model import MultimodalModel, Parallel
from ..family import Blueprint, Layers, ModelFamily
from .model_spec import ModelSpec
from .program import MultimodalProgram


def family_of(page: ModelSpec) -> ModelFamily:
    """What hooks take: see :class:`dip_megatron.families.family.ModelFamily`."""
    return family_of_class(page.name, page, lambda _: page)


def family_of_class(name: str, any_page: ModelSpec, choose: Callable[[Mapping[str, Any]], ModelSpec]) -> ModelFamily:
    """The family of a class that several models share, each with a page like ``any_page``: ``choose`` gives the page
    for arguments of the class's constructor, or raises ValueError."""

    def describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
        page = choose(blueprint.kwargs)
        return page.describe(blueprint.kwargs[page.config_name], blueprint.calls.get("freeze", {}), parallel)

    def program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> MultimodalProgram:
        return MultimodalProgram(
            choose(blueprint.kwargs), blueprint.kwargs, layers, rank=rank, micro_batch_size=micro_batch_size,
            freeze=blueprint.calls.get("freeze"),
        )  # fmt: skip

    kind = any_page.model_class
    recorded = ("freeze",) if hasattr(kind, "freeze") else ()
    return ModelFamily(
        name, kind, describe, program, any_page.workload, recorded, replicates=any_page.replicates,
        shows=lambda blueprint: choose(blueprint.kwargs).shown(),
    )  # fmt: skip
