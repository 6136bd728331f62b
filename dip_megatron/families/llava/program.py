"""LLaVA in segments: Megatron-Core's own LLaVAModel, ViT and GPT blocks, cut at any layer.

Every chunk is an ``LLaVAModel`` with only its part in it, so that parameter names, data preprocessing, tile handling,
projector and loss are Megatron's, in whatever version is installed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel, get_num_image_embeddings
from megatron.core.transformer.dot_product_attention import DotProductAttention

from ...compat.llava import UnpaddedLLaVA, forget_input, length_multiple, takes_attention
from ...core import ModalityModule, Operation, Unit
from ...describe.workload import Microbatch
from ...runtime.protocol import MicrobatchInputs, OperationShapes, Shapes, Tensors
from ..shared.layout import order_free, segment_config
from ..shared.packing import complete_ends, packed_lengths, shared_ends
from ..shared.sdpa import SdpaAttention, core_attention
from ..shared.segmented import SegmentedProgram, bound, dtype_name, unwrapped
from ..shared.shapes import LANGUAGE, VISION, LlavaShapes
from ..shared.shards import shard_rows
from ..shared.sharing import Sharing, UnitShare

_SIGNATURE = inspect.signature(LLaVAModel.forward)
_UNSUPPORTED = {
    "inference_context": "inference",
    "inference_params": "inference",
    "vision_packed_seq_params": "packed images of mixed resolution",
    "imgs_sizes": "images of mixed resolution",
    "num_frames": "videos as tubelets",
    "sound_clips": "sound",
}


class ViTSegment(CLIPViTModel):
    """The layers of a ViT that one chunk holds; the stem (patch and position embedding) on the first only."""

    @staticmethod
    def adopt(vit: CLIPViTModel, first: bool, last: bool) -> ViTSegment:
        """Turn a CLIPViTModel, whose transformer block already has just the chunk's layers, into a segment."""
        # Built by LLaVAModel itself, so that version-dependent constructor arguments stay its business.
        vit.__class__ = ViTSegment
        vit.first_segment, vit.last_segment = first, last
        if not first:
            for name in ("conv1", "position_embeddings", "ln_pre", "class_token"):
                if hasattr(vit, name):
                    delattr(vit, name)
            vit.decoder.pre_process = False
        if not last:
            vit.ln_post = None
        return vit

    def forward(self, x: torch.Tensor | None, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Images ``[n, 3, h, w]`` on the first segment, else the input tensor ``[s, n, h]`` set before; returns
        ``[s, n, h]``, or ``[n, s, h]`` as CLIPViTModel does from the last segment."""
        if self.first_segment:
            x = super().forward(x, attention_mask)  # [n, s, h]
            return x if self.last_segment else x.permute(1, 0, 2).contiguous()
        x = self.decoder(None, attention_mask)
        if not self.last_segment:
            return x
        x = x.permute(1, 0, 2).contiguous()
        return self.ln_post(x) if self.ln_post is not None else x


class VisionChunk(LLaVAModel):
    """ViT layers; the projector on the last chunk. Tile tags are the language model's business, which embeds them."""

    def __init__(self, first: bool, last: bool, **kwargs: Any):
        kwargs["tile_tags"] = None
        super().__init__(add_encoder=True, add_decoder=False, pre_process=first, post_process=False, **kwargs)
        if not isinstance(self.vision_model, CLIPViTModel):
            raise ValueError(
                f"DIP can segment CLIP, SigLIP and InternViT encoders, not {type(self.vision_model).__name__}; "
                "run this model with --dip-schedule off"
            )
        self.last_segment = last
        ViTSegment.adopt(self.vision_model, first, last)
        if not last:
            self.vision_projection = None

    def forward(self, images: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states ``[s, n, h]``; from the last chunk embeddings ``[image tokens, n, language hidden]``."""
        if not self.last_segment:
            return self.vision_model(images)
        embeddings, _ = super().forward(images, input_ids, None, None)
        return embeddings


class LanguageChunk(UnpaddedLLaVA):
    """GPT layers; embedding and merging of images on the first chunk, head and loss on the last."""

    def __init__(self, first: bool, last: bool, **kwargs: Any):
        super().__init__(
            shard_rows=shard_rows, add_encoder=False, add_decoder=True, pre_process=first, post_process=last, **kwargs
        )

    def take_images(self, embeddings: torch.Tensor, tiles: torch.Tensor | None) -> None:
        """Give the first chunk its images, ``[tokens, tiles, h]``, before it is called; without any, an embedding
        without positions."""
        if embeddings.shape[1] == 0:
            self.encoder_hidden_state = embeddings[:0]
        else:
            self.encoder_hidden_state = embeddings if tiles is None else self.tagged(embeddings, tiles)


class LlavaProgram(SegmentedProgram):
    """Stage program of a LLaVA described by the keyword arguments of Megatron's ``LLaVAModel``.

    ``layers`` gives ``{"vision": layers[segment][rank], "language": ...}``; ``freeze`` the arguments of
    ``LLaVAModel.freeze``.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        layers: Mapping[str, tuple[tuple[int, ...], ...]],
        *,
        rank: int,
        micro_batch_size: int = 1,
        freeze: Mapping[str, bool] | None = None,
    ):
        super().__init__(layers, rank)
        self.kwargs = {k: v for k, v in kwargs.items() if k not in _PLACEMENT}
        self.freeze = dict(freeze or {})
        vision, language = kwargs["vision_transformer_config"], kwargs["language_transformer_config"]
        self._check(vision, language)
        self.modules = (
            ModalityModule(VISION, layers[VISION]), ModalityModule(LANGUAGE, layers[LANGUAGE], (VISION,))
        )  # fmt: skip
        self._tensor_parallel = language.tensor_model_parallel_size
        self._sequence_parallel = language.tensor_model_parallel_size if language.sequence_parallel else 1
        self._context_parallel = language.context_parallel_size
        self._sharing = Sharing(context=self._context_parallel)
        self._multiple = length_multiple(language)
        tags = kwargs.get("tile_tags")
        self._tag_tokens = len(tags[-1]) if tags else 0  # of each tile
        self._image_token = kwargs.get("image_token_index", _default("image_token_index"))
        self._micro_batch_size = micro_batch_size
        self._built_shapes: LlavaShapes | None = None

    def _check(self, vision: Any, language: Any) -> None:
        self.check_layers(VISION, vision.num_layers)
        self.check_layers(LANGUAGE, language.num_layers)
        if getattr(language, "language_model_type", "").startswith("nemotron"):
            raise ValueError("DIP can't segment hybrid (Mamba) language models; use --dip-schedule off")
        if getattr(language, "mtp_num_layers", None):
            raise ValueError(
                "LLaVAModel gives its language model no token ids, which multi-token prediction needs; leave "
                "--mtp-num-layers out, or use --dip-schedule off"
            )
        if vision.context_parallel_size > 1:
            raise ValueError(
                "vision_transformer_config.context_parallel_size is "
                f"{vision.context_parallel_size}: images are not shared out by tokens; set it to 1, as Megatron's "
                "scripts do: each context-parallel rank runs the whole ViT"
            )
        shared = language.context_parallel_size > 1
        if shared and core_attention(self.kwargs["language_transformer_layer_spec"]) is DotProductAttention:
            raise ValueError(
                "Megatron's local attention knows no shards of sequences; for context parallelism give the language "
                "model's layers Transformer Engine's, or torch's (dip_megatron.with_sdpa)"
            )

    @property
    def shapes(self) -> Shapes | OperationShapes:
        """What travels between stages."""
        return self.sizes

    @property
    def sizes(self) -> LlavaShapes:
        """As the model says once its chunks are built; before, as its arguments say."""
        return self._built_shapes or self._shapes()

    def build_chunks(self) -> list[torch.nn.Module]:
        """Vision chunks, then language chunks."""
        chunks: list[LLaVAModel] = []
        for module, kind in ((VISION, VisionChunk), (LANGUAGE, LanguageChunk)):
            for segment, first, last in self.places(module):
                arguments = dict(self.kwargs)
                for name in ("vision", "language"):
                    key = f"{name}_transformer_config"
                    arguments[key] = segment_config(arguments[key], self.layers[name], self.rank)
                spec = f"{module}_transformer_layer_spec"
                arguments[spec] = self.chunk_spec(arguments[spec], module, segment)
                arguments["vision_projection_config"] = order_free(arguments["vision_projection_config"])
                with self._takes_attention():
                    chunk = kind(first, last, vp_stage=segment, **arguments)
                chunk.freeze(**{"freeze_language_model": False, "freeze_vision_model": False,
                                "freeze_vision_projection": False, **self.freeze})  # fmt: skip
                chunks.append(chunk)
        self._built_shapes = replace(
            self._shapes(), vision_tokens=chunks[0].vision_model.seq_length, image_tokens=chunks[0].img_seq_len
        )
        language = self.kwargs["language_transformer_config"]
        return self.finish(chunks, segment_config(language, self.layers[LANGUAGE], self.rank))

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
            context_parallel_size=self._context_parallel,
            image_ranks=self._sharing.ranks,
        )  # fmt: skip

    def _takes_attention(self) -> contextlib.AbstractContextManager[None]:
        core = core_attention(self.kwargs["language_transformer_layer_spec"])
        ours = isinstance(core, type) and issubclass(core, SdpaAttention)
        return takes_attention(core) if ours else contextlib.nullcontext()

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of ``LLaVAModel.forward`` by name. Raises ValueError for what has no segmented form."""
        return bound(_SIGNATURE, args, kwargs, _UNSUPPORTED)

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Images, and the lengths of the combined sequences (padded to the longest, as Megatron pads them)."""
        images, ids = inputs.arguments["images"], inputs.arguments["input_ids"]
        count = 0 if images is None else int(images.shape[0])
        token = inputs.arguments.get("image_token_index")
        per_sample = (ids == (self._image_token if token is None else token)).sum(dim=-1).tolist()
        tiles = inputs.arguments.get("num_image_tiles")
        per_image = [1] * sum(per_sample) if tiles is None else [int(t) for t in tiles]
        if sum(per_image) != count or len(per_image) != sum(per_sample):
            raise ValueError(
                f"the batch has {sum(per_sample)} image tokens for {len(per_image)} images of {sum(per_image)} tiles, "
                f"and pixels of {count} tiles"
            )
        if self._tag_tokens and count and (tiles is None or len(per_image) != 1):
            raise ValueError(
                f"Megatron's LLaVAModel knows tile tags for one image a microbatch, with num_image_tiles; this one has "
                f"{len(per_image)}{' and none' if tiles is None else ''}: leave the tags out, or give one image"
            )
        per_tile = self.sizes.image_tokens + self._tag_tokens
        lengths, start = [], 0
        for n in per_sample:
            own = sum(per_image[start : start + n])
            lengths.append(own * per_tile - n + int(ids.shape[1]))
            start += n
        longest = min(max(lengths), int(self.kwargs["language_max_sequence_length"]))
        padded = -(-longest // self._multiple) * self._multiple
        total, seen = padded * len(per_sample), count * self.sizes.image_tokens  # tags are text to the planner
        if count * per_tile > total:
            raise ValueError(
                f"{count} image tiles of {per_tile} tokens don't fit the language model's "
                f"{self.kwargs['language_max_sequence_length']} positions; pack fewer images or raise --seq-length"
            )
        packed = inputs.arguments.get("packed_seq_params")
        sequences = (padded,) * len(per_sample) if packed is None else packed_lengths(packed, padded)
        rows = 0 if len(per_sample) == self._micro_batch_size else len(per_sample)
        return Microbatch(total - seen, (self.sizes.image_tokens,) * count, sequences=sequences, rows=rows)

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """Where samples begin and end in a packed sequence."""
        return shared_ends(inputs)

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """See ModelProgram."""
        complete_ends(inputs, shared)

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: list[Tensors], microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        arguments = microbatch.arguments
        if stage.module == VISION:
            output = self._encode(chunk, unit, inputs, arguments)
        else:
            self._set_language_input(chunk, inputs, arguments)
            output, _ = chunk(**_only_forward(arguments))
        _forget_input(chunk)
        return {"hidden": output}

    def _encode(
        self, chunk: torch.nn.Module, unit: Unit, inputs: list[Tensors], arguments: Mapping[str, Any]
    ) -> torch.Tensor:  # fmt: skip
        own, share = slice(unit.first, unit.first + unit.count), None
        if self._sharing.ranks > 1:
            share = UnitShare.of((self.sizes.image_tokens,) * unit.count, own, self._sharing, len)
            own = share.own
        if inputs:
            hidden = inputs[0]["hidden"]
            if share is not None:
                hidden = share.arriving(hidden, _IMAGES)
            # Only their number matters now; ranks after the first may have been given no pixels at all.
            images = hidden.new_empty(hidden.shape[_IMAGES], 0)
            _inner(chunk).vision_model.set_input_tensor(hidden)
        else:
            images = arguments["images"][own]
        output: torch.Tensor = chunk(images, arguments["input_ids"])
        if share is None:
            return output
        if unwrapped(chunk, VisionChunk).last_segment:
            return share.gathered(output, share.instances, _IMAGES)
        return share.leaving(output, _IMAGES)

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """Loss per token and the expanded loss mask, as LLaVAModel returns them."""
        self._set_language_input(chunk, inputs, arguments)
        output = chunk(**_only_forward(arguments))
        _forget_input(chunk)
        return output

    def _set_language_input(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> None:
        model = unwrapped(chunk, LanguageChunk)
        if not model.pre_process:
            model.language_model.set_input_tensor(inputs[0]["hidden"])
            return
        if inputs:
            images = torch.cat([i["hidden"] for i in inputs], dim=1)
        else:
            hidden, device = self.sizes.language_hidden, arguments["input_ids"].device
            images = torch.empty(0, 0, hidden, dtype=getattr(torch, self.sizes.dtype), device=device)
        model.take_images(images, arguments.get("num_image_tiles"))


_IMAGES = 1  # the dimension of images in what goes from stage to stage
_PLACEMENT = ("pre_process", "post_process", "add_encoder", "add_decoder", "vp_stage")


def _default(name: str) -> Any:
    return inspect.signature(LLaVAModel.__init__).parameters[name].default


def _only_forward(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Language chunks need no pixels, only their number where Megatron counts one tile an image."""
    passed = dict(arguments)
    if passed.get("num_image_tiles") is None and passed.get("images") is not None:
        images = passed["images"]
        passed["num_image_tiles"] = torch.ones(images.shape[0], dtype=torch.int, device=passed["input_ids"].device)
    passed["images"] = None
    return passed


def _forget_input(chunk: torch.nn.Module) -> None:
    forget_input(_inner(chunk))


def _inner(chunk: torch.nn.Module) -> LLaVAModel:
    return unwrapped(chunk, LLaVAModel)
