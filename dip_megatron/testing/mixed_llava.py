"""LLaVA in static stages that mix modalities: ViT layers, projector and GPT layers one after the other, cut anywhere.

This is how a LLaVA would be pipelined without DIP. Megatron's own schedules can't run it (its ViT stays on the first
stage); with it their orders run through the same executor as DIP's plans, on the best partition, for comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings

from ..core import Message, ModalityModule, Operation, Payload, Plan, TensorSpec, Unit
from ..describe.cost import LayerRun
from ..families.llava.program import LanguageChunk, LlavaProgram, VisionChunk, _forget_input, _only_forward
from ..families.shared import deferred_linear, layer_memory
from ..families.shared.layout import SegmentLayout, order_free, segment_config
from ..families.shared.segmented import dtype_name, unwrapped
from ..families.shared.shapes import LANGUAGE, VISION, LlavaShapes
from ..runtime.protocol import MicrobatchInputs, Tensors

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


class MixedChunk(torch.nn.Module):
    """One static stage: a piece of the ViT, a piece of the GPT, or both (then the projector and embedding between)."""

    def __init__(self, vision: VisionChunk | None, language: LanguageChunk | None, config: Any):
        super().__init__()
        self.vision, self.language, self.config = vision, language, config
        self.share_embeddings_and_output_weights = False

    def forward(self, compute: Any) -> Any:
        """Whatever ``compute`` does with this chunk."""
        return compute(self)


class MixedLlavaProgram(LlavaProgram):
    """Stage program of a LLaVA in V segments of P mixed stages, one unit per microbatch (see ``cost.mixed_graph``).

    ``stages`` lists the V * P virtual stages in the order in which a microbatch passes them; segment k runs from the
    last rank to the first where ``reversed_segments[k]``.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        stages: Sequence[Sequence[LayerRun]],
        *,
        rank: int,
        ranks: int,
        reversed_segments: Sequence[bool] = (),
        micro_batch_size: int = 1,
    ):
        if not stages or len(stages) % ranks or any(not stage for stage in stages):
            raise ValueError(f"{len(stages)} stages on {ranks} ranks: must be a multiple, and none empty")
        segments = len(stages) // ranks
        self._stages = tuple(tuple(stage) for stage in stages)
        self._back = tuple(reversed_segments) or (False,) * segments
        runs = [[self._stages[self._stage(k, r, ranks)] for r in range(ranks)] for k in range(segments)]

        def layers(module: str) -> Layers:
            return tuple(tuple(sum(x.layers for x in s if x.module == module) for s in line) for line in runs)

        super().__init__(
            kwargs, {VISION: layers(VISION), LANGUAGE: layers(LANGUAGE)}, rank=rank, micro_batch_size=micro_batch_size
        )
        total = tuple(tuple(sum(x.layers for x in s) for s in line) for line in runs)
        self.modules = (ModalityModule(MODEL, total, reversed=self._back if any(self._back) else ()),)  # type: ignore[assignment]

    def _stage(self, segment: int, rank: int, ranks: int) -> int:
        return segment * ranks + (ranks - 1 - rank if self._back[segment] else rank)

    def _run(self, segment: int, rank: int, module: str) -> LayerRun | None:
        stage = self._stages[self._stage(segment, rank, self.ranks)]
        return next((run for run in stage if run.module == module), None)

    @property
    def loss_rank(self) -> int:
        """The rank that holds the last stage."""
        return 0 if self._back[-1] else self.ranks - 1

    def build_chunks(self) -> list[torch.nn.Module]:
        """This rank's stages, segment by segment."""
        chunks: list[torch.nn.Module] = []
        for segment in range(len(self._back)):
            arguments = dict(self.kwargs)
            for name in (VISION, LANGUAGE):
                key = f"{name}_transformer_config"
                arguments[key] = segment_config(arguments[key], self.layers[name], self.rank)
                layout = StageLayout(self.layers[name], self.rank, self._back)
                arguments[key].pipeline_model_parallel_layout = layout
            arguments["vision_projection_config"] = order_free(arguments["vision_projection_config"])
            parts: dict[str, Any] = {VISION: None, LANGUAGE: None}
            for module, kind in ((VISION, VisionChunk), (LANGUAGE, LanguageChunk)):
                run = self._run(segment, self.rank, module)
                if run is not None:
                    parts[module] = kind(run.stem, run.head, vp_stage=segment, **arguments)
            config = copy.copy(arguments["language_transformer_config"])
            config.pipeline_model_parallel_layout = None
            chunk = MixedChunk(parts[VISION], parts[LANGUAGE], config)
            deferred_linear.install(chunk, self.mode)
            layer_memory.install(chunk, self.mode)
            chunks.append(chunk)
        self._supports_split = not any(deferred_linear.undeferrable(chunk) for chunk in chunks)
        self._built_shapes = self._shapes()
        return chunks

    def _shapes(self) -> LlavaShapes:
        kwargs = self.kwargs
        vision, language = kwargs["vision_transformer_config"], kwargs["language_transformer_config"]
        sizes = (kwargs.get("img_h", 336), kwargs.get("img_w", 336), kwargs.get("patch_dim", 14))
        return LlavaShapes(
            vision_tokens=get_num_image_embeddings(*sizes, vision.vision_model_type, False, 1, False),
            vision_hidden=vision.hidden_size,
            image_tokens=get_num_image_embeddings(
                *sizes, vision.vision_model_type, kwargs["drop_vision_class_token"], 1,
                kwargs.get("pixel_shuffle", False),
            ),
            language_hidden=language.hidden_size,
            micro_batch_size=self._micro_batch_size,
            sequence_parallel_size=self._sequence_parallel,
            dtype=dtype_name(language),
        )  # fmt: skip

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: list[Tensors], microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see StageProgram."""
        hidden = inputs[0]["hidden"] if inputs else None
        return {"hidden": self._compute(_inner(chunk), stage.segment, stage.rank, hidden, microbatch.arguments)}

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """See StageProgram."""
        inner, segment = _inner(chunk), len(self._back) - 1
        return self._compute(inner, segment, self.loss_rank, inputs[0]["hidden"], arguments, final=True)

    def _compute(
        self, chunk: MixedChunk, segment: int, rank: int, hidden: torch.Tensor | None, arguments: Mapping[str, Any],
        final: bool = False,
    ) -> Any:  # fmt: skip
        images, ids = arguments["images"], arguments["input_ids"]
        if chunk.vision is not None:
            run = self._run(segment, rank, VISION)
            assert run is not None
            if images is None or images.shape[0] == 0:
                shape = self._after(VISION, run.head, 0, 0)
                hidden = torch.empty(shape, dtype=getattr(torch, self.shapes.dtype), device=ids.device)
            else:
                if not run.stem:
                    chunk.vision.vision_model.set_input_tensor(hidden)
                hidden = chunk.vision(images, ids)
                _forget_input(chunk.vision)
        if chunk.language is None:
            return hidden
        run = self._run(segment, rank, LANGUAGE)
        assert run is not None
        if run.stem:
            # Without images Megatron expects an embedding without positions.
            assert hidden is not None
            chunk.language.encoder_hidden_state = hidden if hidden.shape[1] else hidden[:0]
        else:
            chunk.language.language_model.set_input_tensor(hidden)
        output = chunk.language(**_only_forward(dict(arguments)))
        _forget_input(chunk.language)
        return output if final else output[0]

    def _after(self, module: str, head: bool, images: int, tokens: int) -> tuple[int, ...]:
        shapes = self.shapes
        if module == LANGUAGE:
            return (tokens // shapes.sequence_parallel_size, shapes.micro_batch_size, shapes.language_hidden)
        if head:
            return (shapes.image_tokens, images, shapes.language_hidden)
        return (shapes.vision_tokens, images, shapes.vision_hidden)

    def payload(self, plan: Plan, message: Message, loads: Sequence[Any]) -> Payload:
        """What a message of a plan over these stages carries; ``loads[m]`` is microbatch m's (see ``load``)."""
        key = message.target if message.channel.gradient else message.source
        load = loads[plan.graph.units[key.unit].microbatch]
        run = self._stages[self._stage(key.segment, key.rank, self.ranks)][-1]
        tokens = sum(load.sequences or (load.tokens,)) // self.shapes.micro_batch_size
        shape = self._after(run.module, run.head, len(load.images), tokens)
        return (TensorSpec("hidden", shape, self.shapes.dtype),)


def _inner(chunk: torch.nn.Module) -> MixedChunk:
    return unwrapped(chunk, MixedChunk)
