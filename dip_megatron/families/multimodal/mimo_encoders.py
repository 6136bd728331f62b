"""Encoders of Megatron-Core's MIMO models: how each class is cut, :class:`MimoEncoder`, one entry a class.

A MIMO model takes encoders of any class. Which layers one has is known to that class alone, so it needs an entry here:
Megatron-Core's CLIPViTModel has one, :func:`register_encoder` adds others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel

from ...describe.files import ConfigurationError
from ...describe.model import PatchEmbedding, TransformerLayer
from ...describe.model.ends import Nothing, Stem
from ..describe import layer_shape
from ..shared.cut import CutPoints
from .shapes import HiddenShape

Given = Mapping[str, Any]
"""Arguments by name: ``params`` of the encoder's constructor, as its spec has them, ``inputs`` of its forward."""


class MimoEncoder(ABC):
    """How the encoders of one class are cut and counted. Its output, ``[instances, tokens, width]`` or ``[tokens,
    width]`` of all instances one after the other, goes to the projection, whose business this isn't."""

    @abstractmethod
    def points(self, params: Given) -> CutPoints:
        """Where it is cut, by names within the encoder. Its forward runs on every chunk, with the microbatch's real
        inputs: what stands for a stem on chunks after the first must take them."""

    @abstractmethod
    def layers(self, params: Given) -> int:
        """How many."""

    @abstractmethod
    def layer(self, params: Given) -> TransformerLayer:
        """Each of them, in the planner's words."""

    def stem(self, params: Given) -> Stem:
        """What comes before them, in the planner's words."""
        return Nothing()

    @abstractmethod
    def hidden(self, params: Given) -> HiddenShape:
        """Hidden states between them, as they travel."""

    @abstractmethod
    def tokens(self, params: Given, inputs: Given) -> list[int]:
        """Of each instance in ``inputs``, as the encoder's output has them. Raises ValueError for inputs that
        contradict themselves, and for those that can't be cut between instances."""

    def some(self, params: Given, inputs: Given, own: slice) -> dict[str, Any]:
        """``inputs`` of some instances, where they lie along the first dimension of every tensor."""
        return {name: value[own] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def leaving(self, hidden: torch.Tensor, inputs: Given) -> torch.Tensor:
        """Hidden states, as a layer returns them for these ``inputs``, in the shape in which they travel."""
        return hidden

    def arriving(self, hidden: torch.Tensor, inputs: Given) -> torch.Tensor:
        """Inverse of :meth:`leaving`."""
        return hidden


_ENCODERS: dict[type[torch.nn.Module], MimoEncoder] = {}


def register_encoder(kind: type[torch.nn.Module], entry: MimoEncoder) -> None:
    """Let DIP cut encoders of class ``kind``, not of classes that extend it, in MIMO models."""
    _ENCODERS[kind] = entry


def encoder_of(kind: type[torch.nn.Module]) -> MimoEncoder:
    """Its entry. Raises ConfigurationError."""
    if kind not in _ENCODERS:
        raise ConfigurationError(
            f"DIP doesn't know how a {kind.__name__} is cut, only {', '.join(k.__name__ for k in _ENCODERS)}; give it "
            "an entry (register_encoder, docs/add-a-model.md), or use --dip-schedule off"
        )
    return _ENCODERS[kind]


class _NoPatches(torch.nn.Module):
    """In the place of a convolution into patches: none of its results, in their shape."""

    def __init__(self, convolution: Any):
        super().__init__()
        self._width, self._patch = convolution.out_channels, convolution.kernel_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, columns = (size // patch for size, patch in zip(pixels.shape[2:], self._patch, strict=True))
        return pixels.new_zeros(()).expand(pixels.shape[0], self._width, rows, columns)


class _NoPositions(torch.nn.Module):
    """In the place of position embeddings, which are added."""

    def __init__(self, _: torch.nn.Module):
        super().__init__()

    def forward(self, _: torch.Tensor) -> float:
        return 0.0


class ClipViT(MimoEncoder):
    """CLIPViTModel as CLIP, SigLIP or InternViT: pictures of one size, all of whose positions are handed on."""

    def points(self, params: Given) -> CutPoints:
        kind = params.get("model_subtype", "clip")
        stem = ["conv1", "position_embeddings"]
        if params.get("add_class_token", True):
            stem.append("class_token")
        if kind == "clip":
            stem.append("ln_pre")
        return CutPoints(
            "decoder.layers", stem=tuple(stem), tail=("ln_post",) if kind == "siglip" else (),
            stubs={"conv1": _NoPatches, "position_embeddings": _NoPositions},
        )  # fmt: skip

    def layers(self, params: Given) -> int:
        return int(params["transformer_config"].num_layers)

    def layer(self, params: Given) -> TransformerLayer:
        return layer_shape(params["transformer_config"], causal=False)

    def stem(self, params: Given) -> Stem:
        return PatchEmbedding(params.get("patch_dim", 14))

    def hidden(self, params: Given) -> HiddenShape:
        return HiddenShape(params["transformer_config"].hidden_size, padded=_positions(params))

    def tokens(self, params: Given, inputs: Given) -> list[int]:
        if inputs.get("attention_mask") is not None:
            raise ValueError("DIP can't cut a CLIPViTModel's attention_mask between pictures; leave it out")
        pixels, size = inputs["x"], (params.get("img_h", 336), params.get("img_w", 336))
        if tuple(pixels.shape[2:]) != size:
            raise ValueError(
                f"the microbatch has pictures of {tuple(pixels.shape[2:])} pixels, the encoder takes {size}"
            )
        return [_positions(params)] * int(pixels.shape[0])

    def leaving(self, hidden: torch.Tensor, inputs: Given) -> torch.Tensor:
        return hidden.transpose(0, 1).contiguous()

    arriving = leaving


def _positions(params: Given) -> int:
    """Patches and class tokens of a picture."""
    patch = params.get("patch_dim", 14)
    patches = (params.get("img_h", 336) // patch) * (params.get("img_w", 336) // patch)
    return int(patches + (params.get("class_token_len", 1) if params.get("add_class_token", True) else 0))


register_encoder(CLIPViTModel, ClipViT())
