"""The model families that DIP knows without being told."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.multimodal.llava_model import LLaVAModel

from ..compat.mimo import mimo
from ..describe.model import ModulePartition, MultimodalModel, Parallel
from .describe import describe_gpt, describe_llava, describe_t2v
from .family import Blueprint, Layers, ModelFamily
from .gpt.mixed import MixedGptProgram
from .gpt.program import GptProgram
from .llava.mixed import MixedLlavaProgram
from .llava.program import LlavaProgram
from .t2v.mixed import MixedT2vProgram
from .t2v.program import T2vProgram, TextToVideoModel


def known_families() -> tuple[ModelFamily, ...]:
    """Families whose classes are looked for in every script."""
    own: tuple[ModelFamily, ...] = ()
    if mimo() is not None:
        from .multimodal.mimo import MIMO

        own = (MIMO,)
    return (
        ModelFamily("llava", LLaVAModel, _describe_llava, _llava_program, "vlm-documents", ("freeze",), _mixed_llava),
        ModelFamily("gpt", GPTModel, _describe_gpt, _gpt_program, "text-packed", mixed_program=_mixed_gpt),
        ModelFamily("t2v", TextToVideoModel, _describe_t2v, _t2v_program, "t2v-mix", ("freeze",), _mixed_t2v),
        *own,
    )


def _describe_llava(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    return describe_llava(blueprint.kwargs, blueprint.calls.get("freeze", {}), parallel)


def _llava_program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> LlavaProgram:
    return LlavaProgram(
        blueprint.kwargs, layers, rank=rank, micro_batch_size=micro_batch_size, freeze=blueprint.calls.get("freeze")
    )


def _mixed_llava(
    blueprint: Blueprint, stages: ModulePartition, *, rank: int, micro_batch_size: int
) -> MixedLlavaProgram:  # fmt: skip
    return MixedLlavaProgram(
        blueprint.kwargs, stages, rank=rank,
        micro_batch_size=micro_batch_size, freeze=blueprint.calls.get("freeze"),
    )  # fmt: skip


def _describe_gpt(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    return describe_gpt(blueprint.kwargs, parallel)


def _gpt_program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> GptProgram:
    return GptProgram(blueprint.kwargs, layers, rank=rank, micro_batch_size=micro_batch_size)


def _mixed_gpt(
    blueprint: Blueprint, stages: ModulePartition, *, rank: int, micro_batch_size: int
) -> MixedGptProgram:  # fmt: skip
    return MixedGptProgram(
        blueprint.kwargs, stages, rank=rank,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip


def _describe_t2v(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    return describe_t2v(blueprint.kwargs, blueprint.calls.get("freeze", {}), parallel)


def _t2v_program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> T2vProgram:
    _one_pack(micro_batch_size)
    return T2vProgram(blueprint.kwargs, layers, rank=rank, freeze=blueprint.calls.get("freeze"))


def _mixed_t2v(
    blueprint: Blueprint, stages: ModulePartition, *, rank: int, micro_batch_size: int
) -> MixedT2vProgram:  # fmt: skip
    _one_pack(micro_batch_size)
    return MixedT2vProgram(
        blueprint.kwargs, stages, rank=rank,
        freeze=blueprint.calls.get("freeze"),
    )  # fmt: skip


def _one_pack(micro_batch_size: int) -> None:
    if micro_batch_size != 1:
        raise ValueError(
            f"--micro-batch-size {micro_batch_size}: must be 1, a microbatch of TextToVideoModel is one pack of clips"
        )
