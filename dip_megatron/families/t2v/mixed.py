"""Text to video in static stages that mix modalities: LLM layers, projector and DiT layers one after the other, cut
anywhere.

This is how such a model would be pipelined without DIP; Megatron's own orders and zero bubble's run over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...core import Operation, Unit
from ...describe.cost import LayerRun
from ...runtime.protocol import Inputs, MicrobatchInputs, Tensors
from ..shared.layout import segment_config
from ..shared.mixed import OnStages, Stages
from ..shared.shapes import DIFFUSION, LANGUAGE, MixedT2vShapes, T2vEnd
from .program import Part, T2vProgram, VideoBatch


class MixedT2vProgram(OnStages, T2vProgram):
    """Stage program of a :class:`.program.TextToVideoModel` in V segments of P mixed stages, one unit per microbatch;
    see :class:`Stages`."""

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        stages: Sequence[Sequence[LayerRun]],
        *,
        rank: int,
        ranks: int,
        reversed_segments: Sequence[bool] = (),
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models and stages that can't be."""
        self._stages = Stages(stages, ranks, reversed_segments)
        layers = {name: self._stages.layers(name) for name in (LANGUAGE, DIFFUSION)}
        super().__init__(kwargs, layers, rank=rank, freeze=freeze)
        self.modules = (self._stages.module,)  # type: ignore[assignment]
        ends = tuple(
            tuple(self._end(self._stages.at(k, r)[-1]) for r in range(ranks)) for k in range(self._stages.segments)
        )
        self.shapes = MixedT2vShapes(self.sizes, ends)

    @staticmethod
    def _end(run: LayerRun) -> T2vEnd:
        if run.module == DIFFUSION:
            return "diffusion"
        return "condition" if run.head else "text"

    def build_chunks(self) -> list[torch.nn.Module]:
        """This rank's stages, segment by segment."""
        kwargs = dict(self.kwargs)
        for module, name in ((LANGUAGE, "text_config"), (DIFFUSION, "diffusion_config")):
            kwargs[name] = segment_config(kwargs[name], self.layers[module], self.rank)
            kwargs[name].pipeline_model_parallel_layout = self._stages.layout(module, self.rank)
        chunks = []
        for segment in range(self._stages.segments):
            ends = {run.module: (run.stem, run.head) for run in self._stages.at(segment, self.rank)}
            chunk = Part(kwargs, ends, vp_stage=segment)
            chunk.freeze(**self.freeze)
            chunks.append(chunk)
        return self.finish(chunks, kwargs["diffusion_config"])

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        output: Tensors = self._all(chunk, inputs, microbatch.arguments["batch"])
        return output

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """Losses or velocities of all clips, as TextToVideoModel returns them."""
        return self._all(chunk, inputs, arguments["batch"])

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """All of it: every unit is a microbatch."""
        return 1.0

    @staticmethod
    def _all(chunk: torch.nn.Module, inputs: Inputs, batch: VideoBatch) -> Any:
        return chunk(batch=batch, state=dict(inputs[0]) if inputs else {})
