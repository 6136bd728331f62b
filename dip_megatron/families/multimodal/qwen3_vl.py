"""Qwen3-VL and Qwen3.5-VL of Megatron-Bridge: a vision transformer of Megatron's layers, of which some (deepstack) also
feed the language model's first layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model import Qwen3VLModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.utils import reorganize_inputs

from ...compat.layer_specs import specs_of_all_layers
from ..shared.cut import CutPoints
from ..shared.layout import without_layout
from .deepstack import DeepstackVision, add_to_layer
from .grids import PIXELS, VIDEOS, GivenRows
from .model_spec import Arguments, ModelSpec
from .shapes import HiddenShape


class _Given(GivenRows):
    def answer(self, rows: torch.Tensor) -> Any:
        """Embeddings; what deepstack adds comes to each layer by itself."""
        return rows, []


class Vision(DeepstackVision):
    """Instances are images and videos in the order of their tokens, as the model's forward sorts them."""

    called = "vision_model"
    splits = True

    def points(self, config: Any) -> CutPoints:
        tapped = self.tapped(config)
        return CutPoints(
            "vision_model.decoder.layers",
            stem=("vision_model.patch_embed", "vision_model.pos_embed"),
            unused=("vision_model.fast_pos_embed_interpolate",),
            tail=("vision_model.merger",),
            taps="vision_model.decoder.deepstack_merger_list" if tapped else "",
            tapped=tapped,
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.vision_config.hidden_size, rows=self.merged(config), middle=(1,))

    def _sorted(self, config: Any, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of patches, images before videos, and grids, in the order of their tokens."""
        images, videos = self.grids(arguments)
        counts = [int(grid.prod(dim=-1).sum()) for grid in (images, videos)]
        rows = torch.arange(sum(counts), device=images.device)[:, None]
        own = rows.split(counts)
        merged, grid, _ = reorganize_inputs(
            arguments["input_ids"], own[0] if counts[0] else None, own[1] if counts[1] else None,
            images, videos, image_token_id=config.image_token_id, video_token_id=config.video_token_id,
            square_merge_size=self.merged(config),
        )  # fmt: skip
        return (rows if merged is None else merged)[:, 0], grid

    def seen(self, config: Any, arguments: Arguments) -> tuple[torch.Tensor | None, torch.Tensor]:
        rows, grid = self._sorted(config, arguments)
        pixels = [given for given in (arguments.get(PIXELS), arguments.get(VIDEOS)) if given is not None]
        return (torch.cat(pixels)[rows] if pixels else None), grid

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        super().tokens(config, arguments)  # as many as there are places for
        _, grid = self._sorted(config, arguments)
        return [patches // self.merged(config) for patches in grid.prod(dim=-1).tolist()]

    def call(self, model: Any, hidden: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        patches = hidden[:, 0] if hidden.dim() == 3 else hidden
        embeddings: torch.Tensor = model.vision_model(hidden_states=patches, grid_thw=grid)[0]
        return embeddings

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return _Given(embeddings, self.merged(config))


class Qwen3Vl(ModelSpec):
    """Qwen3.5-VL has the same class: its layers, full attention among gated delta nets, come as a list, and it has
    multi-token prediction."""

    name = "qwen3-vl"
    model_class = Qwen3VLModel
    encoders = (Vision(),)
    config_name = "language_transformer_config"
    shares = shares_packed = predicts = True
    usual_picture = 300
    """Patches of 16 x 16, four a token."""

    def check(self, config: Any) -> None:
        super().check(config)
        if getattr(config, "mtp_num_layers", None) and not hasattr(config, "build_mtp_spec"):
            raise ValueError(
                f"a {type(config).__name__} says nothing of its {config.mtp_num_layers} multi-token prediction layers; "
                "leave out mtp_num_layers"
            )
        if getattr(config, "vision_dp_when_cp", False):
            raise ValueError("DIP places encoders itself; leave out vision_dp_when_cp")
        if getattr(getattr(config, "dist_train", None), "use_dist_train", False):
            raise ValueError("DIP places encoders itself; leave out dist_train.use_dist_train")

    def check_call(self, arguments: Arguments) -> None:
        packed, ids = arguments.get("packed_seq_params"), arguments.get("input_ids")
        if packed is not None and ids is not None and ids.shape[0] > 1:
            raise ValueError("DIP can't run several rows of packed samples; pack them into one row")

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        own = copy.copy(kwargs[self.config_name])
        if own.recompute_granularity == "full":
            own.recompute_granularity = None  # plans say what is recomputed
        parts = {"add_encoder": True, "add_decoder": False, "pre_process": True, "post_process": False}
        return Qwen3VLModel(**{**kwargs, self.config_name: own, **parts, "vp_stage": None})

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        vision = copy.copy(kwargs["vision_transformer_config"])
        vision.deepstack_visual_indexes = []  # looked at only to demand all of deepstack on the first chunk
        given = {
            **kwargs, self.config_name: config, "vision_transformer_config": vision, "add_encoder": False,
            "add_decoder": True, "pre_process": first, "post_process": last, "vp_stage": segment,
        }  # fmt: skip
        if hasattr(config, "build_language_spec"):
            given["language_transformer_layer_spec"] = config.build_language_spec(vp_stage=segment)
        given["mtp_block_spec"] = None
        if last and getattr(config, "mtp_num_layers", None):  # beside the head, whatever layers the chunk has
            with specs_of_all_layers():
                given["mtp_block_spec"] = without_layout(config).build_mtp_spec()
        model = Qwen3VLModel(**given)
        model.add_encoder = first
        return model

    def add_tap(
        self, model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
    ) -> torch.Tensor:  # fmt: skip
        return add_to_layer(model.language_model, hidden, where, tap, row)
