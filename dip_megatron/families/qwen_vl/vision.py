"""Hugging Face's vision transformer of Qwen2.5-VL, cut between any two of its blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel

from ...compat.bridge import vision_transformer
from ...runtime.modes import StageMode
from ..shared import block_memory
from ..shared.segmented import ModelPart


class NumberedBlocks(torch.nn.ModuleList):
    """Blocks under the numbers they have in the whole model, by which weights are loaded, saved and exported."""

    def __init__(self, blocks: Iterable[torch.nn.Module], first: int):
        super().__init__()
        for number, block in enumerate(blocks, first):
            self.add_module(str(number), block)


class MergedRows(torch.nn.Module):
    """In the merger's place where more blocks follow: it leaves the patches of each token as they are, in one row.

    The transformer works through patches window by window, and brings what the merger returns back into the order of
    tokens. So what travels between segments is in that order, and the next one sorts it by windows as if it were new.
    """

    def __init__(self, merged: int):
        super().__init__()
        self._merged = merged

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[patches, h]`` to ``[patches / merged, merged * h]``."""
        return hidden.reshape(-1, self._merged * hidden.shape[-1])


class VisionChunk(ModelPart):
    """Blocks of the transformer; patch embedding before the model's first, merger after its last."""

    def __init__(self, config: Any, layers: tuple[tuple[int, ...], ...], rank: int, segment: int):
        """``config`` is Bridge's provider; ``layers[segment][rank]``."""
        super().__init__(config, pre_process=False, post_process=False, vp_stage=segment)
        first = sum(sum(line) for line in layers[:segment]) + sum(layers[segment][:rank])
        self.first_segment = segment == rank == 0
        last = (segment, rank) == (len(layers) - 1, len(layers[0]) - 1)
        own = copy.deepcopy(config.vision_config)
        own.depth = layers[segment][rank]
        self.visual = visual = vision_transformer(own)
        visual.fullatt_block_indexes = [
            number - first for number in visual.fullatt_block_indexes if first <= number < first + own.depth
        ]
        visual.blocks = NumberedBlocks(visual.blocks, first)
        if not self.first_segment:
            visual.patch_embed = torch.nn.Identity()
        if not last:
            visual.merger = MergedRows(visual.spatial_merge_unit)
        self._hidden = own.hidden_size

    freeze = Qwen25VLModel.freeze

    def follow(self, mode: StageMode) -> None:
        """Let the blocks follow the memory strategies of the stage that runs."""
        block_memory.install(list(self.visual.blocks), mode)

    def forward(self, hidden: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Pixels of patches ``[patches, values]`` on the first segment, else rows ``[tokens, merged * h]``; rows again,
        or embeddings ``[tokens, language hidden]`` from the last. ``grid`` ``[images, 3]``: frames, height and width
        of each in patches."""
        if self.first_segment:
            hidden = hidden.to(self.config.params_dtype)
        else:
            hidden = hidden.reshape(-1, self._hidden)
        embeddings: torch.Tensor = self.visual(hidden, grid_thw=grid, return_dict=True).pooler_output
        return embeddings
