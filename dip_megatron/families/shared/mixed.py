"""What programs share whose chunks are static stages, cut anywhere: of several modules, or of one placed in a V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core import ModalityModule
from ...describe.cost import LayerRun
from .layout import SegmentLayout

MODEL = "model"
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


class Stages:
    """The V * P virtual stages of a model, in the order in which a microbatch passes them; segment k runs from the last
    rank to the first where ``reversed_segments[k]``."""

    def __init__(self, stages: Sequence[Sequence[LayerRun]], ranks: int, reversed_segments: Sequence[bool] = ()):
        """Raises ValueError for stages that can't be."""
        if not stages or len(stages) % ranks or any(not stage for stage in stages):
            raise ValueError(f"{len(stages)} stages on {ranks} ranks: must be a multiple, and none empty")
        self.ranks, self.segments = ranks, len(stages) // ranks
        self.reversed = tuple(reversed_segments) or (False,) * self.segments
        self._stages = tuple(tuple(stage) for stage in stages)

    def at(self, segment: int, rank: int) -> tuple[LayerRun, ...]:
        """The layers of a rank's stage."""
        place = self.ranks - 1 - rank if self.reversed[segment] else rank
        return self._stages[segment * self.ranks + place]

    def run(self, segment: int, rank: int, module: str) -> LayerRun | None:
        """Those of one module; None if it has none there."""
        return next((run for run in self.at(segment, rank) if run.module == module), None)

    def layers(self, module: str | None = None) -> Layers:
        """Numbers of layers ``[segment][rank]``: of a module, or of all."""
        return tuple(
            tuple(
                sum(run.layers for run in self.at(k, r) if module in (None, run.module)) for r in range(self.ranks)
            )
            for k in range(self.segments)
        )  # fmt: skip

    def layout(self, module: str, rank: int) -> StageLayout:
        """Where a module's layers are, for Megatron."""
        return StageLayout(self.layers(module), rank, self.reversed)

    @property
    def module(self) -> ModalityModule:
        """All of it, as a plan's graph has it (see ``cost.priced_graph``)."""
        return ModalityModule(MODEL, self.layers(), reversed=self.reversed if any(self.reversed) else ())

    @property
    def loss_rank(self) -> int:
        """The rank that holds the last stage."""
        return 0 if self.reversed[-1] else self.ranks - 1


class OnStages:
    """A program over :class:`Stages`, which it sets before it is asked."""

    _stages: Stages

    @property
    def loss_rank(self) -> int:
        """The rank that holds the last stage."""
        return self._stages.loss_rank


def refuse_tied(tied: bool) -> None:
    """Raises ValueError for a model whose embedding and head are one table."""
    if tied:
        raise ValueError(
            "a schedule over mixed chunks can't tie embedding and head, which stand on any two ranks there; use "
            "one over segments (static, dynamic)"
        )
