"""What programs share whose chunks are static stages, cut anywhere: of several modules, or of one placed in a V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core import ModalityModule
from ...describe.model import LayerRun, ModulePartition
from .layout import SegmentLayout

Layers = tuple[tuple[int, ...], ...]


class StageLayout(SegmentLayout):
    """:class:`SegmentLayout` whose segments may run from the last rank to the first."""

    def __init__(self, layers: Layers, rank: int, reversed_segments: Sequence[bool]):
        super().__init__(layers, rank)
        self.reversed_segments = tuple(reversed_segments)

    def get_num_layers_to_build(
        self, layer_type: Any = None, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """As SegmentLayout, of this very rank."""
        return self.layers[vp_stage or 0][self.rank]

    def get_layer_offset(self, layer_type: Any = None, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        """As SegmentLayout, of this very rank."""
        segment = vp_stage or 0
        line = self.layers[segment]
        before = line[self.rank + 1 :] if self.reversed_segments[segment] else line[: self.rank]
        return sum(map(sum, self.layers[:segment])) + sum(before)


class OnStages:
    """A program over chunks that may hold layers of several modules, which it sets before it is asked."""

    stages: ModulePartition

    def set_stages(self, stages: ModulePartition) -> None:
        """Raises ValueError for a chunk without layers, which no program can build."""
        if any(not chunk for chunk in stages.stages):
            raise ValueError(f"{len(stages.stages)} stages on {len(stages.layers[0])} ranks: none may be empty")
        self.stages = stages

    @property
    def loss_rank(self) -> int:
        """The rank that holds the last stage."""
        return 0 if self.stages.runs_back(self.stages.segments - 1) else len(self.stages.layers[0]) - 1

    def run_of(self, segment: int, rank: int, module: str) -> LayerRun | None:
        """The layers of one module on a rank's stage; None if it has none there."""
        return next((run for run in self.stages.chunks[segment][rank] if run.module == module), None)

    def layout(self, module: str, rank: int) -> StageLayout:
        """Where a module's layers are, for Megatron."""
        back = tuple(map(self.stages.runs_back, range(self.stages.segments)))
        return StageLayout(self.stages.layers_of(module), rank, back)

    @property
    def graph_module(self) -> ModalityModule:
        """All of the stages, as a plan's graph has them."""
        return ModalityModule(self.stages.module, self.stages.layers, reversed=self.stages.reversed)


def refuse_tied(tied: bool) -> None:
    """Raises ValueError for a model whose embedding and head are one table."""
    if tied:
        raise ValueError(
            "a schedule over mixed chunks can't tie embedding and head, which stand on any two ranks there; use "
            "one over segments (static, dynamic)"
        )
