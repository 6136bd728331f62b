"""Qwen2.5-VL among the model families. Importing it imports Megatron-Bridge: its adapter does, once Bridge is there."""

from __future__ import annotations

from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel

from ...describe.model import MultimodalModel, Parallel
from ..family import Blueprint, Layers, ModelFamily
from .describe import describe_qwen_vl
from .program import QwenVlProgram


def _describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    return describe_qwen_vl(blueprint.kwargs["config"], blueprint.calls.get("freeze", {}), parallel)


def _program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> QwenVlProgram:
    return QwenVlProgram(
        blueprint.kwargs["config"], layers, rank=rank, micro_batch_size=micro_batch_size,
        freeze=blueprint.calls.get("freeze"),
    )  # fmt: skip


QWEN_VL = ModelFamily("qwen-vl", Qwen25VLModel, _describe, _program, "vlm-any-resolution", ("freeze",))
