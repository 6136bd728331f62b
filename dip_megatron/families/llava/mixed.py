"""LLaVA in static stages that mix modalities: ViT layers, projector and GPT layers one after the other, cut anywhere.

This is how a LLaVA would be pipelined without DIP. Megatron's own schedules can't run it (its ViT stays on the first
stage); with it their orders run through the same executor as DIP's plans, on the best partition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ...core import Operation, Unit
from ...describe.model import LayerRun, ModulePartition
from ...runtime.protocol import MicrobatchInputs, Tensors
from ..shared.layout import order_free, segment_config
from ..shared.mixed import OnStages, refuse_tied
from ..shared.segmented import ModelPart
from ..shared.shapes import LANGUAGE, VISION, MixedLlavaShapes, StageEnd
from .program import LanguageChunk, LlavaProgram, VisionChunk, _forget_input, _only_forward


class MixedChunk(ModelPart):
    """One static stage: a piece of the ViT, a piece of the GPT, or both (then the projector and embedding between).

    Modules stand under the names that they have in the whole LLaVAModel, so that checkpoints of any schedule load. The
    pieces that know how to call them are kept aside.
    """

    def __init__(self, vision: VisionChunk | None, language: LanguageChunk | None, config: Any, segment: int):
        super().__init__(
            config, pre_process=language is not None and language.pre_process,
            post_process=language is not None and language.post_process, vp_stage=segment,
        )  # fmt: skip
        self._pieces = (vision, language)
        self.vision_model = None if vision is None else vision.vision_model
        self.vision_projection = None if vision is None else vision.vision_projection
        self.language_model = None if language is None else language.language_model

    @property
    def parts(self) -> list[torch.nn.Module]:
        """The LLaVAModel pieces."""
        return [piece for piece in self._pieces if piece is not None]

    def train(self, mode: bool = True) -> MixedChunk:
        """As any module's, for the pieces too."""
        for piece in self.parts:
            piece.train(mode)
        super().train(mode)
        return self

    def forward(
        self, images: torch.Tensor | None, hidden: torch.Tensor | None, *, nothing: torch.Tensor | None = None,
        arguments: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """What the stage sends on; from the last one what LLaVAModel returns. ``hidden`` is what has come; ``nothing``
        stands for the ViT's part of a microbatch without images."""
        vision, language = self._pieces
        if vision is not None:
            if nothing is not None:
                hidden = nothing
            else:
                if hidden is not None:
                    vision.vision_model.set_input_tensor(hidden)
                hidden = vision(images, arguments["input_ids"])
                _forget_input(vision)
        if language is None:
            return hidden
        if self.pre_process:
            assert hidden is not None
            language.take_images(hidden, arguments.get("num_image_tiles"))
        else:
            language.language_model.set_input_tensor(hidden)
        output = language(**_only_forward(arguments))
        _forget_input(language)
        return output if self.post_process else output[0]


class MixedLlavaProgram(OnStages, LlavaProgram):
    """Stage program of a LLaVA in V segments of P mixed stages, one unit per microbatch; see :class:`OnStages`."""

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        stages: ModulePartition,
        *,
        rank: int,
        micro_batch_size: int = 1,
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models and stages that can't be."""
        refuse_tied(bool(kwargs.get("share_embeddings_and_output_weights")))
        self.set_stages(stages)
        super().__init__(
            kwargs, {name: stages.layers_of(name) for name in (VISION, LANGUAGE)}, rank=rank,
            micro_batch_size=micro_batch_size, freeze=freeze,
        )  # fmt: skip
        self.modules = (self.graph_module,)  # type: ignore[assignment]

    @property
    def shapes(self) -> MixedLlavaShapes:
        """What travels between stages."""
        ends = tuple(
            tuple(self._end(self.stages.chunks[k][r][-1]) for r in range(self.ranks))
            for k in range(self.stages.segments)
        )
        return MixedLlavaShapes(self.sizes, ends)

    @staticmethod
    def _end(run: LayerRun) -> StageEnd:
        if run.module == LANGUAGE:
            return "language"
        return "projected" if run.head else "vision"

    def build_chunks(self) -> list[torch.nn.Module]:
        """This rank's stages, segment by segment."""
        chunks: list[MixedChunk] = []
        for segment in range(self.stages.segments):
            arguments = dict(self.kwargs)
            for name in (VISION, LANGUAGE):
                key = f"{name}_transformer_config"
                arguments[key] = segment_config(arguments[key], self.layers[name], self.rank)
                arguments[key].pipeline_model_parallel_layout = self.layout(name, self.rank)
            arguments["vision_projection_config"] = order_free(arguments["vision_projection_config"])
            parts: dict[str, Any] = {VISION: None, LANGUAGE: None}
            for module, kind in ((VISION, VisionChunk), (LANGUAGE, LanguageChunk)):
                run = self.run_of(segment, self.rank, module)
                if run is not None:
                    with self._takes_attention():
                        parts[module] = kind(run.stem, run.head, vp_stage=segment, **arguments)
                    parts[module].freeze(**{"freeze_language_model": False, "freeze_vision_model": False,
                                            "freeze_vision_projection": False, **self.freeze})  # fmt: skip
            config = copy.copy(arguments["language_transformer_config"])
            chunks.append(MixedChunk(parts[VISION], parts[LANGUAGE], config, segment))
        self._built_shapes = self._shapes()
        return self.finish(chunks, chunks[0].config)

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: list[Tensors], microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        hidden = inputs[0]["hidden"] if inputs else None
        return {"hidden": self._compute(chunk, stage.segment, stage.rank, hidden, microbatch.arguments)}

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """See ModelProgram."""
        hidden = inputs[0]["hidden"] if inputs else None
        return self._compute(chunk, self.stages.segments - 1, self.loss_rank, hidden, arguments)

    def _compute(
        self, chunk: torch.nn.Module, segment: int, rank: int, hidden: torch.Tensor | None,
        arguments: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        images, nothing = arguments["images"], None
        run = self.run_of(segment, rank, VISION)
        if run is not None:
            if hidden is not None:
                # Only their number matters now; ranks after the first may have been given no pixels at all.
                images = hidden.new_empty(hidden.shape[1], 0)
            if images is None or images.shape[0] == 0:
                shape = self.sizes.hidden(self._end(run), images=0, tokens=0)
                device = hidden.device if hidden is not None else arguments["input_ids"].device
                nothing = torch.empty(shape, dtype=getattr(torch, self.sizes.dtype), device=device)
        return chunk(images if run is not None else None, hidden, nothing=nothing, arguments=arguments)
