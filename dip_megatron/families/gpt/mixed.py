"""A text-only GPT in stages placed in a V, as zero bubble's ZB-V has them: the first rank has both ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from ...describe.model import ModulePartition
from ...runtime.protocol import Tensors
from ..shared.layout import segment_config
from ..shared.mixed import OnStages, refuse_tied
from ..shared.shapes import LANGUAGE
from .program import GptProgram


class MixedGptProgram(OnStages, GptProgram):
    """Stage program of a GPT in V segments of P stages, one unit per microbatch; see :class:`OnStages`."""

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        stages: ModulePartition,
        *,
        rank: int,
        micro_batch_size: int = 1,
    ):
        """Raises ValueError for models and stages that can't be."""
        refuse_tied(bool(kwargs.get("share_embeddings_and_output_weights")))
        self.set_stages(stages)
        super().__init__(
            kwargs, {LANGUAGE: stages.layers_of(LANGUAGE)}, rank=rank, micro_batch_size=micro_batch_size
        )  # fmt: skip
        self.modules = (self.graph_module,)

    def build_chunks(self) -> list[torch.nn.Module]:
        """This rank's stages, segment by segment."""
        config = segment_config(self.kwargs["config"], self.layers[LANGUAGE], self.rank)
        config.pipeline_model_parallel_layout = self.layout(LANGUAGE, self.rank)
        chunks = []
        for segment in range(self.stages.segments):
            (run,) = self.stages.chunks[segment][self.rank]
            placed = {"pre_process": run.stem, "post_process": run.head, "vp_stage": segment}
            chunks.append(GPTModel(**(self.kwargs | {"config": config}), **placed))
        return self.finish(chunks, config)

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """Loss per token or logits, as of GptProgram. Raises ValueError where the loop keeps the labels from the rank
        that has the last stage."""
        if "labels" in arguments and arguments["labels"] is None:
            raise ValueError(
                f"the script's forward_step gives pipeline rank {self.rank} no labels, and in a V the loss is computed "
                "there; let it read the whole batch on every rank, or use a schedule without a V"
            )
        return super().final(chunk, inputs, arguments)
