"""Encoders of pictures of any size: rows of patches one after the other, and a grid for each picture or video."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ..shared.cut import found
from .model_spec import Arguments, Encoder, check_places

PIXELS, VIDEOS = "pixel_values", "pixel_values_videos"


class GivenRows:
    """Stands for an encoder: each call gets the rows that belong to its grids, in order. ``known`` are attributes that
    a model may ask of its encoder."""

    def __init__(self, embeddings: torch.Tensor, merged: int, **known: Any):
        self._rows, self._merged, self._next = embeddings, merged, 0
        self.__dict__ |= {"dtype": embeddings.dtype, "device": embeddings.device, **known}

    def __call__(self, *_: Any, grid_thw: torch.Tensor, **__: Any) -> Any:
        start = self._next
        self._next += int(grid_thw.prod(dim=-1).sum()) // self._merged
        return self.answer(self._rows[start : self._next])

    def answer(self, rows: torch.Tensor) -> Any:
        """As Hugging Face's encoders return embeddings."""
        return SimpleNamespace(pooler_output=rows)


class GridEncoder(Encoder):
    """``merge ** 2`` patches become one token. Instances are the images of a microbatch, then its videos."""

    values = (PIXELS, VIDEOS)

    def config(self, config: Any) -> Any:
        """The encoder's own, of the model's."""
        return config.vision_config

    def token(self, config: Any, kind: str) -> int:
        """Id of the token in whose places an ``image`` or a ``video`` stands."""
        found: int = getattr(config, f"{kind}_token_id")
        return found

    def merged(self, config: Any) -> int:
        """Patches that become one token."""
        return int(self.config(config).spatial_merge_size) ** 2

    def grids(self, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames, height and width in patches of each image, and of each video: ``[n, 3]`` each, ``n`` may be 0."""
        none = torch.empty(0, 3, dtype=torch.long, device=arguments["input_ids"].device)
        images, videos = (arguments.get(f"{kind}_grid_thw") for kind in ("image", "video"))
        return none if images is None else images, none if videos is None else videos

    def seen(self, config: Any, arguments: Arguments) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Patches ``[patches, values]``, if they are here, and the grid of each instance, ``[instances, 3]``: frames,
        height and width."""
        pixels = [rows for rows in (arguments.get(PIXELS), arguments.get(VIDEOS)) if rows is not None]
        images, videos = self.grids(arguments)
        flat = [rows.reshape(-1, rows.shape[-1]) for rows in pixels]
        return (torch.cat(flat) if flat else None), torch.cat((images, videos))

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        counted = []
        for kind, grid in zip(("image", "video"), self.grids(arguments), strict=True):
            own = [patches // self.merged(config) for patches in grid.prod(dim=-1).tolist()]
            counted += check_places(arguments, self.token(config, kind), own, kind, f"{kind}s")
        return counted

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> Any:
        pixels, grid = self.seen(model.config, arguments)
        if hidden is None:
            assert pixels is not None
            patches = grid.prod(dim=-1).tolist()
            start = sum(patches[: own.start])
            hidden = pixels[start : start + sum(patches[own])].to(model.config.params_dtype)
        return self.call(model, hidden, grid[own])

    def call(self, model: Any, hidden: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """The model's encoder on patches or hidden states; see :meth:`encode`."""
        embeddings: torch.Tensor = found(model, self.called)(hidden, grid_thw=grid).pooler_output
        return embeddings

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        """No pixels, of which only the number of rows is looked at."""
        pixels = {name: arguments[name] for name in (PIXELS, VIDEOS) if arguments.get(name) is not None}
        return {name: rows[..., :1] if present else None for name, rows in pixels.items()}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        merge = self.config(config).spatial_merge_size
        return GivenRows(embeddings, self.merged(config), spatial_merge_size=merge)
