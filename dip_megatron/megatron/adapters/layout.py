"""How a run's flags lay out layers over pipeline ranks and virtual stages: Megatron-LM's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_FLAGS = (
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


@dataclass(frozen=True)
class GivenLayout:
    """What ``flags`` ask for: ``layers`` of the language model, ``[virtual stage][rank]``."""

    flags: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return ", ".join(self.flags)


def given_layout(args: Any) -> GivenLayout | None:
    """The layout that Megatron's validated ``args`` give; None if they give none, or it doesn't hold all layers."""
    values = {name: getattr(args, name, None) for name in _FLAGS}
    flags = tuple(
        f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None and value is not False
    )
    if not flags:
        return None
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    text = getattr(args, "pipeline_model_parallel_layout", None)
    if text is not None:
        layers = _parsed(text, args.pipeline_model_parallel_size)
    else:
        layers = _computed(
            args.num_layers, args.pipeline_model_parallel_size, virtual,
            getattr(args, "decoder_first_pipeline_num_layers", None),
            getattr(args, "decoder_last_pipeline_num_layers", None),
            bool(getattr(args, "account_for_embedding_in_pipeline_split", False)),
            bool(getattr(args, "account_for_loss_in_pipeline_split", False)),
        )  # fmt: skip
    return None if sum(map(sum, layers)) != args.num_layers else GivenLayout(flags, layers)


def take_layout(args: Any) -> None:
    """Leave nothing of the layout in ``args``: chunks are DIP's, and every rank has one data iterator."""
    for name in _FLAGS:
        if hasattr(args, name):
            setattr(args, name, False if name.startswith("account_for") else None)
    if getattr(args, "virtual_pipeline_model_parallel_size", None) is not None:
        args.virtual_pipeline_model_parallel_size = None
        # As Megatron sets them for a pipeline without virtual stages.
        args.overlap_p2p_comm = args.align_param_gather = False


def _parsed(layout: Any, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Megatron's own reading of ``--pipeline-model-parallel-layout``."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    parsed = layout if isinstance(layout, PipelineParallelLayerLayout) else PipelineParallelLayerLayout(layout, ranks)
    by_rank = [[sum(kind == LayerType.decoder for kind in stage) for stage in rank] for rank in parsed.layout]
    return tuple(zip(*by_rank, strict=True))


def _computed(
    layers: int, ranks: int, virtual: int, first: int | None, last: int | None, embedding: bool, loss: bool
) -> tuple[tuple[int, ...], ...]:
    if first is None and last is None:
        each = (layers + embedding + loss) // ranks
        lines = [[each // virtual] * ranks for _ in range(virtual)]
        lines[0][0] -= embedding
        lines[-1][-1] -= loss
    else:
        left = ranks - (first is not None) - (last is not None)
        each = (layers - (first or 0) - (last or 0)) // left if left else 0
        line = [each] * ranks
        line[0] = each if first is None else first
        line[-1] = line[-1] if last is None else last
        lines = [[count // virtual for count in line] for _ in range(virtual)]
    return tuple(map(tuple, lines))
