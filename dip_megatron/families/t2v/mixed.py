"""Text to video in static stages that mix modalities: LLM layers, projector and DiT layers one after the other, cut
anywhere.

This is how such a model would be pipelined without DIP; Megatron's own orders and zero bubble's run over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core import Operation, Unit
from ...describe.model import LayerRun, ModulePartition
from ...runtime.protocol import Inputs, MicrobatchInputs, Tensors
from ..shared.layout import segment_config
from ..shared.mixed import OnStages
from ..shared.shapes import DIFFUSION, LANGUAGE, MixedT2vShapes, T2vEnd
from .program import Part, T2vProgram, VideoBatch


class MixedT2vProgram(OnStages, T2vProgram):
    """Stage program of a :class:`.program.TextToVideoModel` in V segments of P mixed stages, one unit per microbatch;
    see :class:`OnStages`."""

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        stages: ModulePartition,
        *,
        rank: int,
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models and stages that can't be."""
        self.set_stages(stages)
        layers = {name: stages.layers_of(name) for name in (LANGUAGE, DIFFUSION)}
        super().__init__(kwargs, layers, rank=rank, freeze=freeze)
        self.modules = (self.graph_module,)  # type: ignore[assignment]
        ends = tuple(
            tuple(self._end(self.stages.chunks[k][r][-1]) for r in range(self.ranks))
            for k in range(self.stages.segments)
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
            kwargs[name].pipeline_model_parallel_layout = self.layout(module, self.rank)
        chunks = []
        for segment in range(self.stages.segments):
            ends = {run.module: (run.stem, run.head) for run in self.stages.chunks[segment][self.rank]}
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
