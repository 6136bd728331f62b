"""MoonViT, whose code comes with a model's folder: pictures of any size, a patch a row, no padding between them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .model_spec import Arguments, Encoder, check_places, projector_of
from .shapes import HiddenShape

_PIXELS = "pixel_values"


@dataclass(frozen=True)
class MoonVitSizes:
    """What a model's config says of it; ``merge`` patches, rows and columns, become one token."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    patch: int
    merge: tuple[int, int]

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.merge[0] * self.merge[1]


class MoonVision(Encoder):
    """An instance is a picture. ``grids`` is the argument with its height and width in patches, the last two of a line;
    ``inside`` what the encoder's names stand in, ``projector`` the module behind it."""

    grids: ClassVar[str]
    inside: ClassVar[str] = ""
    projector: ClassVar[str]

    @abstractmethod
    def sizes(self, config: Any) -> MoonVitSizes:
        """By the model's config."""

    @abstractmethod
    def token(self, config: Any) -> int:
        """Id of the token in whose places pictures stand."""

    @abstractmethod
    def features(self, model: Any, rows: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Embeddings of pictures, by the model's method that is ``called``."""

    def points(self, config: Any) -> CutPoints:
        tower = f"{self.inside}vision_tower"
        return CutPoints(
            f"{tower}.encoder.blocks",
            stem=(f"{tower}.patch_embed",),
            tail=(f"{tower}.encoder.final_layernorm", f"{self.inside}{self.projector}"),
            halves=("", "mlp"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        sizes = self.sizes(config)
        return HiddenShape(sizes.hidden, rows=sizes.merged)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        own, output = self.sizes(config), config.hidden_size
        sees, wide = not freeze.get("freeze_vision_model"), own.merged * own.hidden
        return ModuleShape(
            self.name, self.kind, own.layers, TransformerLayer(own.hidden, own.ffn, own.heads, own.heads),
            PatchEmbedding(own.patch, 3), projector_of(wide**2 + wide * output, own.hidden, output, own.merged),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        grids, merged = arguments.get(self.grids), self.sizes(config).merged
        found = [] if grids is None else grids.tolist()
        counted = [line[-2] * line[-1] // merged for line in found]
        return check_places(
            arguments, self.token(config), counted, "image", "images",
            "; give each as many, and cut no image off at a sequence's end",
        )  # fmt: skip

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        grids = arguments[self.grids]
        if hidden is None:
            patches = grids.prod(dim=-1).tolist()
            start = sum(patches[: own.start])
            hidden = arguments[_PIXELS][start : start + sum(patches[own])].to(model.config.params_dtype)
        return self.features(model, hidden, grids[own])

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        """A single patch, or the model would take the microbatch for one of text alone."""
        return {_PIXELS: arguments[_PIXELS][:1] if present else None}
