"""Text to video: an LLM reads the prompts, a diffusion transformer learns the flow from noise to latents given them.

:class:`TextToVideoModel` is the whole model, as a pretrain script builds it and as Megatron runs it without a pipeline.
:class:`T2vProgram` is the same model in segments; each chunk holds a part of it under the same parameter names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ...core import ModalityModule, Operation, Unit
from ...describe.workload import Clip, Microbatch
from ...runtime.protocol import Inputs, MicrobatchInputs, OperationShapes, Shapes, Tensors
from ..shared.layout import segment_config
from ..shared.parts import projector
from ..shared.sdpa import SdpaAttention, core_attention
from ..shared.segmented import ModelPart, SegmentedProgram, bound, dtype_name, unwrapped
from ..shared.shapes import DIFFUSION, LANGUAGE, T2vShapes
from .diffusion import DiffusionTransformer, Grid, patchify, unpatchify
from .share import share_of
from .text_encoder import TextEncoder, unshared


@dataclass(frozen=True)
class VideoBatch:
    """Clips of one microbatch, or some of them.

    ``tokens`` are their prompts one after the other, each of its ``prompt_lengths``; ``latents`` ``[channels, frames,
    height, width]`` a clip and as much ``noise`` (None: ``latents`` are noisy already); ``timesteps`` ``[clips]`` from
    0 (noise) to 1 (data)."""

    tokens: torch.Tensor
    prompt_lengths: tuple[int, ...]
    latents: tuple[torch.Tensor, ...]
    timesteps: torch.Tensor
    noise: tuple[torch.Tensor, ...] | None = None

    def part(self, first: int, count: int) -> VideoBatch:
        """``count`` clips from number ``first`` on."""
        here = slice(first, first + count)
        begin = sum(self.prompt_lengths[:first])
        lengths = self.prompt_lengths[here]
        noise = None if self.noise is None else self.noise[here]
        tokens = self.tokens[begin : begin + sum(lengths)]
        return VideoBatch(tokens, lengths, self.latents[here], self.timesteps[here], noise)

    def check(self, patch: Grid, channels: int) -> None:
        """Raises ValueError for a batch that no text-to-video model can take."""
        counts = {len(self.prompt_lengths), len(self.latents), len(self.timesteps)}
        counts |= set() if self.noise is None else {len(self.noise)}
        if len(counts) > 1 or not self.latents:
            raise ValueError(f"prompts, latents, noise and timesteps must be of as many clips, at least one: {counts}")
        if min(self.prompt_lengths) < 1 or sum(self.prompt_lengths) != len(self.tokens):
            raise ValueError(
                f"prompts of {self.prompt_lengths} tokens with {len(self.tokens)} tokens in all: every clip needs a "
                "prompt of at least one token (for training without prompt, a token that means so)"
            )
        for i, latent in enumerate(self.latents):
            shape = tuple(latent.shape)
            if len(shape) != 4 or shape[0] != channels or any(n % p for n, p in zip(shape[1:], patch, strict=True)):
                raise ValueError(
                    f"clip {i}: latents of shape {shape}, expected [{channels}, frames, height, width] in multiples of "
                    f"the patch {patch}"
                )
            if self.noise is not None and self.noise[i].shape != latent.shape:
                raise ValueError(f"clip {i}: noise of shape {tuple(self.noise[i].shape)} for latents of {shape}")

    def grids(self, patch: Grid) -> list[Grid]:
        """Patches of each clip in frames, rows and columns."""
        sizes = (tuple(n // p for n, p in zip(x.shape[1:], patch, strict=True)) for x in self.latents)
        return [(f, h, w) for f, h, w in sizes]

    def noisy(self, patch: Grid) -> torch.Tensor:
        """Patches on the straight way from noise to data, ``[t, values]``."""
        if self.noise is None:
            return torch.cat([patchify(x, patch) for x in self.latents])
        times = self.timesteps.float().unbind()
        mixed = [t * x + (1 - t) * n for t, x, n in zip(times, self.latents, self.noise, strict=True)]
        return torch.cat([patchify(x, patch) for x in mixed])

    def velocity(self, patch: Grid) -> torch.Tensor:
        """Where that way leads at every point (rectified flow, arXiv 2209.03003), ``[t, values]`` in float32."""
        assert self.noise is not None
        ways = [(x - n).float() for x, n in zip(self.latents, self.noise, strict=True)]
        return torch.cat([patchify(way, patch) for way in ways])


class Part(ModelPart):
    """A text encoder, a diffusion transformer, or both: all of them or what a chunk holds. ``kwargs`` are those of
    :class:`TextToVideoModel`."""

    def __init__(self, kwargs: Mapping[str, Any], ends: Mapping[str, tuple[bool, bool]], vp_stage: int | None):
        """``ends`` are the modules it has a part of, and whether each of them begins and ends there."""
        config: TransformerConfig = kwargs["diffusion_config"]
        super().__init__(
            config, pre_process=ends.get(LANGUAGE, (False, False))[0],
            post_process=ends.get(DIFFUSION, (False, False))[1], vp_stage=vp_stage,
            pg_collection=kwargs.get("pg_collection"),
        )  # fmt: skip
        self.patch = tuple(kwargs["patch"])
        self.channels = kwargs["latent_channels"]
        self.text_encoder = self.text_projection = self.diffusion = None
        self._share = share_of(config, self.pg_collection)

        def placed(module: str) -> dict[str, Any]:
            first, last = ends[module]
            return {"first": first, "last": last, "vp_stage": vp_stage, "pg_collection": self.pg_collection}

        if LANGUAGE in ends:
            text: TransformerConfig = kwargs["text_config"]
            placement = placed(LANGUAGE)
            if text.context_parallel_size > 1:  # each rank reads all prompts
                text, placement["pg_collection"] = unshared(text, self.pg_collection)
            self.text_encoder = TextEncoder(
                text, kwargs["text_layer_spec"], kwargs["vocabulary"],
                rotary_base=kwargs["text_rotary_base"], **placement,
            )  # fmt: skip
            if ends[LANGUAGE][1]:
                self.text_projection = projector(text.hidden_size, config)
        if DIFFUSION in ends:
            self.diffusion = DiffusionTransformer(
                config, kwargs["diffusion_layer_spec"], channels=self.channels, patch=self.patch,
                largest=tuple(kwargs["largest_grid"]), **placed(DIFFUSION),
            )  # fmt: skip

    def freeze(self, freeze_text_encoder: bool = False, freeze_text_projection: bool = False) -> None:
        """Keep the LLM, or its projector, as they are."""
        for part, frozen in ((self.text_encoder, freeze_text_encoder), (self.text_projection, freeze_text_projection)):
            if part is not None:
                for parameter in part.parameters():
                    parameter.requires_grad = not frozen

    def read(self, batch: VideoBatch, hidden: torch.Tensor | None = None) -> Tensors:
        """The text encoder's layers: hidden states, or from the last of them the condition."""
        assert self.text_encoder is not None
        hidden = self.text_encoder(batch.prompt_lengths, batch.tokens, hidden)
        return {"hidden": hidden} if self.text_projection is None else {"condition": self.text_projection(hidden)}

    def diffuse(self, batch: VideoBatch, state: Tensors) -> Any:
        """The DiT's layers: the state for the next chunk, or what :meth:`TextToVideoModel.forward` returns."""
        dit = self.diffusion
        assert dit is not None
        grids = batch.grids(self.patch)
        noisy = batch.noisy(self.patch) if dit.first else None
        output = dit(grids, batch.prompt_lengths, state, noisy, batch.timesteps)
        if not dit.last:
            return output
        lengths = tuple(math.prod(grid) for grid in grids)
        if batch.noise is not None:
            errors = (output - self._share.rows(batch.velocity(self.patch), lengths)).square().mean(dim=-1)
            return self._share.real(errors, lengths)
        patches = self._share.whole(output, lengths)
        return [unpatchify(p, grid, self.patch) for p, grid in zip(patches, grids, strict=True)]

    def forward(self, batch: VideoBatch, state: Tensors | None = None) -> Any:
        """All that this part does with some clips. ``state`` is the output of the part before."""
        state = state or {}
        if self.text_encoder is not None:
            state = self.read(batch, state.get("hidden"))
        return state if self.diffusion is None else self.diffuse(batch, state)


class TextToVideoModel(Part):
    """LLM text encoder, projector and diffusion transformer, whole."""

    def __init__(
        self,
        *,
        text_config: TransformerConfig,
        text_layer_spec: ModuleSpec,
        vocabulary: int,
        diffusion_config: TransformerConfig,
        diffusion_layer_spec: ModuleSpec,
        latent_channels: int = 16,
        patch: Grid = (1, 2, 2),
        compression: Grid = (8, 8, 8),
        largest_grid: Grid = (32, 48, 48),
        text_rotary_base: int = 10000,
        pg_collection: Any = None,
    ):
        """``text_layer_spec`` and ``diffusion_layer_spec`` are those of :mod:`.text_encoder` and :mod:`.diffusion`.

        ``patch`` groups latents in frames, rows and columns; ``compression`` is the autoencoder's (pixels a latent;
        nothing is computed with it, it tells planner and reports how long and large clips are); ``largest_grid`` the
        most patches of a clip. Raises ValueError for configs that this model can't be built or run with.
        """
        kwargs = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check_configs(kwargs)
        if diffusion_config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "TextToVideoModel has no pipeline of its own: with --pipeline-model-parallel-size above 1 run it "
                "through DIP (--dip-schedule static or dynamic), else use size 1"
            )
        super().__init__(kwargs, dict.fromkeys((LANGUAGE, DIFFUSION), (True, True)), vp_stage=None)

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        prompt_lengths: Sequence[int],
        latents: Sequence[torch.Tensor],
        timesteps: torch.Tensor,
        noise: Sequence[torch.Tensor] | None = None,
    ) -> Any:
        """Clips of one microbatch, of any sizes; see :class:`VideoBatch`.

        With ``noise``, the loss of every patch, ``[patches of all clips]`` in float32: the mean squared error of its
        velocity. Without, ``latents`` are taken as they are at ``timesteps``, and each clip's velocity is returned, in
        the shape of its latents. Context-parallel ranks are given the same clips; each returns the losses of its own
        patches, about as many as the others. Raises ValueError for a batch that contradicts itself.
        """
        return super().forward(_batch(self.patch, self.channels, locals()))


def _check_configs(kwargs: Mapping[str, Any]) -> None:
    text, diffusion = kwargs["text_config"], kwargs["diffusion_config"]
    for name, config in (("text_config", text), ("diffusion_config", diffusion)):
        if config.sequence_parallel:
            raise ValueError(f"{name}: clips are packed without padding, which sequence parallelism doesn't divide; "
                             "leave --sequence-parallel out")  # fmt: skip
    for size in ("tensor_model_parallel_size", "context_parallel_size"):
        if getattr(text, size) != getattr(diffusion, size):
            raise ValueError(f"text_config and diffusion_config must have the same {size}")
    if diffusion.context_parallel_size > 1:
        core = core_attention(kwargs["diffusion_layer_spec"])
        if not (isinstance(core, type) and issubclass(core, SdpaAttention)):
            raise ValueError(
                "diffusion_layer_spec: context parallelism is for torch's attention here, which leaves out what stands "
                "behind clips; use diffusion_layer_spec(transformer_engine=False)"
            )
        if not diffusion.calculate_per_token_loss:
            raise ValueError("diffusion_config: context-parallel ranks may have unequally many patches of a clip, "
                             "which weigh alike with calculate_per_token_loss only; set it")  # fmt: skip
    if diffusion.num_query_groups != diffusion.num_attention_heads:
        raise ValueError("diffusion_config: Megatron's cross attention has no grouped queries; set num_query_groups to "
                         "num_attention_heads")  # fmt: skip


def _batch(patch: Grid, channels: int, arguments: Mapping[str, Any]) -> VideoBatch:
    noise = arguments.get("noise")
    batch = VideoBatch(
        arguments["tokens"], tuple(int(n) for n in arguments["prompt_lengths"]), tuple(arguments["latents"]),
        arguments["timesteps"], None if noise is None else tuple(noise),
    )  # fmt: skip
    batch.check(patch, channels)
    return batch


_SIGNATURE = inspect.signature(TextToVideoModel.forward)
_CONSTRUCTOR = inspect.signature(TextToVideoModel.__init__)


def with_defaults(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of TextToVideoModel, those that were left out too."""
    left_out = {n: p.default for n, p in _CONSTRUCTOR.parameters.items() if p.default is not inspect.Parameter.empty}
    return left_out | dict(kwargs)


class T2vProgram(SegmentedProgram):
    """Stage program of a :class:`TextToVideoModel` described by its keyword arguments.

    ``layers`` gives ``{"language": layers[segment][rank], "diffusion": ...}``; ``freeze`` the arguments of
    ``TextToVideoModel.freeze``. Both modules work on the clips of a microbatch in parts.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        layers: Mapping[str, tuple[tuple[int, ...], ...]],
        *,
        rank: int,
        freeze: Mapping[str, bool] | None = None,
    ):
        """Raises ValueError for models that can't be segmented."""
        super().__init__(layers, rank)
        self.kwargs = with_defaults(kwargs)
        self.freeze = dict(freeze or {})
        _check_configs(self.kwargs)
        text, diffusion = self.kwargs["text_config"], self.kwargs["diffusion_config"]
        self.check_layers(LANGUAGE, text.num_layers)
        self.check_layers(DIFFUSION, diffusion.num_layers)
        self.modules = (
            ModalityModule(LANGUAGE, layers[LANGUAGE]), ModalityModule(DIFFUSION, layers[DIFFUSION], (LANGUAGE,))
        )  # fmt: skip
        self.patch: Grid = tuple(self.kwargs["patch"])
        self.sizes = T2vShapes(
            text_hidden=text.hidden_size,
            hidden=diffusion.hidden_size,
            compression=tuple(self.kwargs["compression"]),
            patch=self.patch,
            dtype=dtype_name(diffusion),
            context_parallel_size=diffusion.context_parallel_size,
        )
        self.shapes: Shapes | OperationShapes = self.sizes

    def build_chunks(self) -> list[torch.nn.Module]:
        """Chunks of the text encoder, then of the diffusion transformer."""
        chunks = []
        for module, name in ((LANGUAGE, "text_config"), (DIFFUSION, "diffusion_config")):
            config = segment_config(self.kwargs[name], self.layers[module], self.rank)
            for segment, first, last in self.places(module):
                chunk = Part(self.kwargs | {name: config}, {module: (first, last)}, vp_stage=segment)
                chunk.freeze(**self.freeze)
                chunks.append(chunk)
        return self.finish(chunks, segment_config(self.kwargs["diffusion_config"], self.layers[DIFFUSION], self.rank))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The clips of a ``model(...)`` call. Raises ValueError for a batch that contradicts itself."""
        arguments = bound(_SIGNATURE, args, kwargs)
        return {"batch": _batch(self.patch, self.kwargs["latent_channels"], arguments)}

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """Clips by their prompts' tokens, and by the frames and pixels that their latents stand for."""
        batch: VideoBatch = inputs.arguments["batch"]
        compression = self.sizes.compression
        sizes = (
            [n * c for n, c in zip(latent.shape[1:], compression, strict=True)] for latent in batch.latents
        )  # fmt: skip
        return Microbatch(clips=tuple(Clip(n, *size) for n, size in zip(batch.prompt_lengths, sizes, strict=True)))

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: Inputs, microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        return self._compute(chunk, unit, inputs, microbatch.arguments["batch"])

    def final(self, chunk: torch.nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """Losses or velocities of the clips of ``inputs.unit``, as TextToVideoModel returns them."""
        assert inputs.unit is not None
        return self._compute(chunk, inputs.unit, inputs, arguments["batch"])

    def loss_share(self, unit: Unit, arguments: Mapping[str, Any]) -> float:
        """The unit's share of the microbatch's patches."""
        counts = [math.prod(grid) for grid in arguments["batch"].grids(self.patch)]
        return sum(counts[unit.first : unit.first + unit.count]) / sum(counts)

    def _compute(self, chunk: torch.nn.Module, unit: Unit, inputs: Inputs, batch: VideoBatch) -> Any:
        part = unwrapped(chunk, Part)
        state: Tensors = dict(inputs[0]) if inputs else {}
        if part.diffusion is not None and part.diffusion.first:
            state = {"condition": torch.cat(list(_prompts(unit, inputs, batch)))}
        return chunk(batch=batch.part(unit.first, unit.count), state=state)


def _prompts(unit: Unit, inputs: Inputs, batch: VideoBatch) -> Iterator[torch.Tensor]:
    """What of the text encoder's outputs belongs to the clips of ``unit``."""
    for source, payload in zip(inputs.units, inputs, strict=True):
        first, end = max(unit.first, source.first), min(unit.first + unit.count, source.first + source.count)
        skip = sum(batch.prompt_lengths[source.first : first])
        yield payload["condition"][skip : skip + sum(batch.prompt_lengths[first:end])]
