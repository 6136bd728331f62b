"""A vision encoder and an audio encoder feed a language model: modules of Megatron-Core's own layers.

:class:`ThreeModuleModel` is the whole model, as a pretrain script builds it and as Megatron runs it without a pipeline.
It knows nothing of DIP; but each of its modules can also be built as what one chunk holds of it, under the same
parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from dip_megatron import ModelPart, applied, encoder_layer_spec, linear, pack, patchify, projector, text_layer_spec

from .shapes import AUDIO, LANGUAGE, VISION

PLACEHOLDER = {VISION: -1, AUDIO: -2}
"""Token ids of the positions that embeddings of images and of audio clips take in a sequence."""


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder reads: instances ``[channels, height, width]``, cut into patches of ``patch`` (rows, columns). A
    spectrogram ``[1, frames, mels]`` is one as well. ``reduction`` patches become one token of the language model."""

    channels: int
    patch: tuple[int, int]
    reduction: int = 1

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.channels * math.prod(self.patch)

    def tokens(self, instance: torch.Tensor) -> int:
        """Tokens of the language model that an instance becomes. Raises ValueError if its size doesn't divide."""
        patches, (channels, height, width) = math.prod(self.grid(instance)), instance.shape
        whole = height % self.patch[0] == width % self.patch[1] == patches % self.reduction == 0
        if channels != self.channels or not whole:
            raise ValueError(
                f"an instance of shape {tuple(instance.shape)}, expected [{self.channels}, height, width] in patches "
                f"of {self.patch}, {self.reduction} to a token"
            )
        return patches // self.reduction

    def grid(self, instance: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of its patches."""
        return instance.shape[1] // self.patch[0], instance.shape[2] // self.patch[1]


@dataclass(frozen=True)
class Settings:
    """All that there is to choose. ``configs`` by module name, ``inputs`` of the two encoders."""

    configs: Mapping[str, TransformerConfig]
    inputs: Mapping[str, EncoderInput]
    vocabulary: int
    sequence_length: int
    transformer_engine: bool = False

    def check(self) -> None:
        """Raises ValueError for what this model can't be built or run with."""
        for name, config in self.configs.items():
            if config.sequence_parallel or config.context_parallel_size > 1:
                raise ValueError(
                    f"{name}: instances are packed without padding, which sequence and context parallelism don't "
                    "divide; leave --sequence-parallel out and use --context-parallel-size 1"
                )


class Encoder(MegatronModule):
    """The layers of an encoder that one chunk holds: a linear of each patch on the first, the projector on the last."""

    def __init__(self, settings: Settings, name: str, *, first: bool, last: bool, **placed: Any):
        config = settings.configs[name]
        super().__init__(config=config)
        self.input = settings.inputs[name]
        self.stem = self.projector = None
        if first:
            self.stem = linear(config, self.input.values, config.hidden_size, config.init_method)
        # What chunks get comes as an argument, not through Megatron's set_input_tensor: pre_process everywhere.
        self.block = TransformerBlock(
            config, encoder_layer_spec(settings.transformer_engine), pre_process=True, post_process=last, **placed
        )
        if last:
            self.projector = projector(self.input.reduction * config.hidden_size, settings.configs[LANGUAGE])

    def forward(self, instances: Sequence[torch.Tensor], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Instances ``[channels, height, width]`` of any sizes, one after the other, each attending to itself alone.

        The first chunk begins with their patches, others with ``hidden`` ``[patches, 1, h]``, which all return but the
        last: that one returns embeddings ``[tokens, 1, hidden size of the language model]``.
        """
        grids = [self.input.grid(instance) for instance in instances]
        if self.stem is not None:
            patches = torch.cat([patchify(x.unsqueeze(1), (1, *self.input.patch)) for x in instances])
            places = torch.cat([positions(*grid, self.config.hidden_size, patches.device) for grid in grids])
            dtype = self.config.params_dtype
            hidden = (applied(self.stem, patches.to(dtype)) + places.to(dtype)).unsqueeze(1)
        assert hidden is not None
        packed = pack([math.prod(grid) for grid in grids], hidden.device)
        hidden = self.block(hidden, attention_mask=None, packed_seq_params=packed)
        if self.projector is None:
            return hidden
        embeddings: torch.Tensor = self.projector(hidden.reshape(-1, 1, self.input.reduction * hidden.shape[-1]))
        return embeddings


def positions(rows: int, columns: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of the row and the column of each patch, ``[rows * columns, width]`` in float32."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 4, device=device) / (width // 4))
    axes = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * rates for axis in axes], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Language(GPTModel):
    """The layers of the language model that one chunk holds: embedding and merging on the first, loss on the last."""

    def __init__(self, settings: Settings, name: str, *, first: bool, last: bool, **placed: Any):
        super().__init__(
            settings.configs[name], text_layer_spec(settings.transformer_engine), settings.vocabulary,
            settings.sequence_length, pre_process=first, post_process=last, position_embedding_type="rope", **placed,
        )  # fmt: skip
        self.decoder.pre_process = True  # see Encoder

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        embeddings: Mapping[str, torch.Tensor],
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``tokens`` and ``labels`` ``[1, s]``. The first chunk puts the encoders' ``embeddings`` in their places, in
        order; others begin with ``hidden`` ``[s, 1, h]``. The last returns the loss of each position ``[1, s]``."""
        if self.pre_process:
            hidden = self.embedding(tokens.clamp(min=0), None)
            for name, embedded in embeddings.items():
                hidden = hidden.masked_scatter((tokens == PLACEHOLDER[name]).T.unsqueeze(-1), embedded)
        output: torch.Tensor = super().forward(tokens, None, None, decoder_input=hidden, labels=labels)
        return output


class Part(ModelPart):
    """The modules ``names``: whole, or what one chunk holds of one of them."""

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        *,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(
            settings.configs[LANGUAGE], pre_process=first and LANGUAGE in names,
            post_process=last and LANGUAGE in names, vp_stage=vp_stage, pg_collection=pg_collection,
        )  # fmt: skip
        placed = {"first": first, "last": last, "vp_stage": vp_stage, "pg_collection": self.pg_collection}
        for name in names:
            kind = Language if name == LANGUAGE else Encoder
            self.add_module(name, kind(settings, name, **placed))

    def freeze(self, encoders: Sequence[str]) -> None:
        """Keep these encoders as they are, all but their projectors."""
        for name in encoders:
            for parameter_name, parameter in self.named_parameters():
                if parameter_name.startswith((f"{name}.stem", f"{name}.block")):
                    parameter.requires_grad = False

    def forward(self, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What module ``name`` does; its own arguments."""
        output: torch.Tensor = self.get_submodule(name)(*args, **kwargs)
        return output


class ThreeModuleModel(Part):
    """Both encoders and the language model, whole."""

    def __init__(self, settings: Settings, pg_collection: Any = None):
        """Raises ValueError for settings that this model can't be built or run with."""
        settings.check()
        if settings.configs[LANGUAGE].pipeline_model_parallel_size > 1:
            raise ValueError(
                "ThreeModuleModel has no pipeline of its own: with --pipeline-model-parallel-size above 1 run it "
                "through DIP (--dip-schedule static or dynamic), else use size 1"
            )
        super().__init__(settings, (VISION, AUDIO, LANGUAGE), pg_collection=pg_collection)

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        images: Sequence[torch.Tensor],
        clips: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The loss of each position, ``[1, s]``.

        ``tokens`` and ``labels`` are one sequence ``[1, s]``, with as many placeholders as ``images`` and audio
        ``clips``, ``[channels, height, width]`` each, become tokens. There may be none of either.
        """
        instances = {VISION: images, AUDIO: clips}
        embeddings = {name: self.get_submodule(name)(own) for name, own in instances.items() if own}
        return super().forward(LANGUAGE, tokens, labels, embeddings)
