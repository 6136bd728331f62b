"""Qwen2.5-VL in segments: Megatron-Bridge's own model, its vision transformer cut off at the call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel

from ...core import ModalityModule, Operation, Unit
from ...describe.workload import Microbatch
from ...runtime.protocol import Inputs, MicrobatchInputs, Tensors
from ..shared.layout import segment_config
from ..shared.packing import packed_lengths
from ..shared.segmented import SegmentedProgram, bound, dtype_name, unwrapped
from ..shared.shapes import LANGUAGE, VISION
from .shapes import QwenVlShapes
from .vision import VisionChunk

_SIGNATURE = inspect.signature(Qwen25VLModel.forward)
_UNSUPPORTED = {
    "inputs_embeds": "embeddings instead of tokens",
    "inference_context": "inference",
    "inference_params": "inference",
}


class LanguageChunk(Qwen25VLModel):
    """GPT layers; embedding and merging of images on the first chunk, head and loss on the last."""

    def __init__(self, config: Any, first: bool, last: bool, segment: int):
        own = copy.copy(config)
        own.vision_config = copy.deepcopy(config.vision_config)
        own.vision_config.depth = 0  # Bridge builds the transformer on the first chunk
        super().__init__(own, pre_process=first, post_process=last, vp_stage=segment)
        if first:
            del self.visual
        # What Bridge's forward gets as pixels are the embeddings already.
        self.get_image_features = self.get_video_features = _features


def _features(embeddings: torch.Tensor, *_: Any, **__: Any) -> SimpleNamespace:
    return SimpleNamespace(pooler_output=(embeddings,))


class QwenVlProgram(SegmentedProgram):
    """Stage program of a Qwen2.5-VL, from Bridge's provider.

    ``layers`` gives ``{"vision": layers[segment][rank], "language": ...}``; ``freeze`` the arguments of
    ``Qwen25VLModel.freeze``. An instance of the vision module is an image, or a video, which come after the images.
    """

    def __init__(
        self,
        provider: Any,
        layers: Mapping[str, tuple[tuple[int, ...], ...]],
        *,
        rank: int,
        micro_batch_size: int = 1,
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models that can't be segmented."""
        super().__init__(layers, rank)
        self._provider = provider
        self._freeze = {f"freeze_{part}": False for part in ("language_model", "vision_model", "vision_projection")}
        self._freeze |= freeze or {}
        vision = provider.vision_config
        self.check_layers(VISION, vision.depth)
        self.check_layers(LANGUAGE, provider.num_layers)
        if getattr(provider, "mtp_num_layers", None):
            raise ValueError("DIP can't segment multi-token prediction layers; use --dip-schedule off")
        if provider.context_parallel_size > 1:
            raise ValueError("DIP can't run Qwen2.5-VL with context parallelism; use --dip-schedule off")
        self.modules = (
            ModalityModule(VISION, layers[VISION]), ModalityModule(LANGUAGE, layers[LANGUAGE], (VISION,)),
        )  # fmt: skip
        self._merged = vision.spatial_merge_size**2
        self.shapes = QwenVlShapes(
            merged=self._merged,
            vision_hidden=vision.hidden_size,
            language_hidden=provider.hidden_size,
            micro_batch_size=micro_batch_size,
            sequence_parallel_size=provider.tensor_model_parallel_size if provider.sequence_parallel else 1,
            dtype=dtype_name(provider),
        )

    def build_chunks(self) -> list[torch.nn.Module]:
        """Vision chunks, then language chunks."""
        language = segment_config(self._provider, self.layers[LANGUAGE], self.rank)
        vision = [
            VisionChunk(self._provider, self.layers[VISION], self.rank, segment)
            for segment, _, _ in self.places(VISION)
        ]
        chunks: list[Any] = [
            *vision,
            *(LanguageChunk(language, first, last, k) for k, first, last in self.places(LANGUAGE)),
        ]
        for chunk in chunks:
            chunk.freeze(**self._freeze)
        for encoder in vision:
            encoder.follow(self.mode)
        return self.finish(chunks, language)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of ``Qwen25VLModel.forward`` by name. Raises ValueError for what has no segmented form."""
        return bound(_SIGNATURE, args, kwargs, _UNSUPPORTED)

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Images and videos as the tokens they become, and the lengths of the sequences."""
        arguments = inputs.arguments
        ids = arguments.get("input_ids")
        if ids is None:
            raise ValueError("the loop's forward_step gives the first pipeline rank no tokens")
        samples, length = ids.shape
        if samples != self.shapes.micro_batch_size:
            raise ValueError(
                f"a microbatch of {samples} samples where the micro batch size is {self.shapes.micro_batch_size}"
            )
        config = self._provider
        tokens = [
            [int(patches) // self._merged for patches in grid.prod(dim=-1)] for grid in _grids(arguments)
        ]  # fmt: skip
        for name, own, placeholder in zip(("image", "video"), tokens, (config.image_token_id, config.video_token_id),
                                          strict=True):  # fmt: skip
            places = int((ids == placeholder).sum())
            if places != sum(own):
                raise ValueError(
                    f"the microbatch has {places} {name} tokens for {len(own)} {name}s that become {sum(own)}"
                )
        packed = arguments.get("packed_seq_params")
        sequences = (int(length),) * samples if packed is None else packed_lengths(packed, int(length))
        images = (*tokens[0], *tokens[1])
        return Microbatch(samples * int(length) - sum(images), images, sequences=sequences)

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see StageProgram."""
        if stage.module == VISION:
            grid = torch.cat(_grids(microbatch.arguments))
            own = slice(unit.first, unit.first + unit.count)
            given = inputs[0]["hidden"] if inputs else self._pixels(microbatch.arguments, grid, own)
            return {"hidden": chunk(given, grid[own])}
        starts = stage.segment == stage.rank == 0
        return {"hidden": self._language(chunk, inputs, microbatch.arguments, starts)}

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """Loss per token ``[b, s]``, or logits without labels, as Qwen25VLModel returns them."""
        return self._language(chunk, inputs, arguments, unwrapped(chunk, LanguageChunk).pre_process)

    def _pixels(self, arguments: Mapping[str, Any], grid: torch.Tensor, own: slice) -> torch.Tensor:
        """Pixels ``[patches, values]`` of some of the images and videos of a microbatch."""
        vision = self._provider.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = [arguments.get(name) for name in ("pixel_values", "pixel_values_videos")]
        patches = grid.prod(dim=-1).tolist()
        start = sum(patches[: own.start])
        rows = torch.cat([p.reshape(-1, values) for p in pixels if p is not None])
        return rows[start : start + sum(patches[own])]

    def _language(
        self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any], starts: bool
    ) -> torch.Tensor:
        model = unwrapped(chunk, LanguageChunk)
        given = dict(arguments) | {"pixel_values": None, "pixel_values_videos": None}
        if starts:
            embeddings = inputs.of(VISION, "hidden")
            if embeddings is not None:
                images, _ = _grids(arguments)
                count = int(images.prod(dim=-1).sum()) // self._merged
                parts = embeddings.split([count, embeddings.shape[0] - count])
                names = ("pixel_values", "pixel_values_videos")
                given |= {name: part for name, part in zip(names, parts, strict=True) if part.shape[0]}
        else:
            model.set_input_tensor(inputs[0]["hidden"])
        output: torch.Tensor = chunk(**given)
        model.language_model.decoder.input_tensor = None  # Megatron's block would hold it until it gets the next
        return output


def _grids(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames, height and width in patches of each image, and of each video: ``[n, 3]`` each, ``n`` may be 0."""
    device = arguments["input_ids"].device
    none = torch.empty(0, 3, dtype=torch.long, device=device)
    images, videos = (arguments.get(f"{kind}_grid_thw") for kind in ("image", "video"))
    return none if images is None else images, none if videos is None else videos
