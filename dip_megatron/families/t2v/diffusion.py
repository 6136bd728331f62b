"""A diffusion transformer over video latents, of any cut: MovieGen's (arXiv 2410.13720, section 3.1) built from
Megatron-Core's layers.

Latents become patches in space and time, each clip a sequence of its own length with learned positions per frame, row
and column. A layer is Megatron's with cross attention to the prompt; its self attention and MLP are scaled, shifted and
gated by the timestep, through one projection for all layers and a table of each layer's own (adaLN-single of
PixArt-alpha, arXiv 2310.00426, section 2.3).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.T5.t5_spec import (
    decoder_model_with_local_spec,
    decoder_model_with_transformer_engine_default_spec,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from ...compat.transformer_engine import column_parallel_linear, norm
from ...runtime.protocol import Tensors
from ..shared.packing import PackedLengths, pack
from ..shared.parts import applied, linear
from ..shared.sdpa import with_sdpa
from .share import share_of

FREQUENCIES = 256
"""Width of a timestep's sines and cosines."""

Grid = tuple[int, int, int]


class DiffusionLayer(TransformerLayer):
    """Megatron's layer with cross attention, modulated by the timestep.

    Megatron's blocks hand every layer the same tensors, and hand them on to checkpoints. Two of these have another
    meaning here: ``context`` is the prompt of all clips, and ``context_mask``, of which packed sequences have no use,
    the modulation ``[clips, 6 h]``.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Flat: a vector, like a bias, whose gradient costs nothing.
        self.modulation = torch.nn.Parameter(_zeros(config, 6 * config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedLengths,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``hidden_states`` ``[t, 1, h]``, ``context`` ``[prompt tokens, 1, h]``; returns both."""
        assert context_mask is not None
        lengths = packed_seq_params.lengths_q
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (context_mask + self.modulation).chunk(6, dim=-1)
        normal = modulate(self.input_layernorm(hidden_states), shift, scale, lengths)
        attended = self.self_attention(normal, attention_mask=None, packed_seq_params=packed_seq_params)
        hidden_states = self._gated(hidden_states, attended, gate, lengths)

        normal = self.pre_cross_attn_layernorm(hidden_states)
        read = self.cross_attention(
            normal, attention_mask=None, key_value_states=context, packed_seq_params=packed_seq_params.cross
        )
        add = self.cross_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_states = add(read, hidden_states, self.hidden_dropout)

        normal = modulate(self.pre_mlp_layernorm(hidden_states), mlp_shift, mlp_scale, lengths)
        return self._gated(hidden_states, self.mlp(normal), mlp_gate, lengths), context

    def _gated(
        self, residual: torch.Tensor, output_with_bias: Any, gate: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        output = torch.nn.functional.dropout(output, self.hidden_dropout, self.training)
        parts = zip(output.split(lengths), gate.unsqueeze(1).unbind(), strict=True)
        return residual + torch.cat([part * own for part, own in parts])


def modulate(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Clips ``[t, 1, h]`` of these lengths, each by its own ``shift`` and ``scale`` ``[clips, h]``."""
    # Clip by clip, so that no shift or scale is written out for every token.
    parts = zip(hidden.split(lengths), shift.unsqueeze(1).unbind(), (1 + scale).unsqueeze(1).unbind(), strict=True)
    return torch.cat([torch.addcmul(own_shift, part, own_scale) for part, own_shift, own_scale in parts])


def diffusion_layer_spec(transformer_engine: bool = False) -> ModuleSpec:
    """A DiT layer: Megatron's T5 decoder layer, its attention full, modulated. Local with torch's attention, or
    Transformer Engine's."""
    if transformer_engine:
        spec = copy.deepcopy(decoder_model_with_transformer_engine_default_spec())
        _apart(spec)
    else:
        spec = with_sdpa(decoder_model_with_local_spec())
    spec.module = DiffusionLayer
    for attention in (spec.submodules.self_attention, spec.submodules.cross_attention):
        attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    spec.submodules.sharded_state_dict_keys_map = {}
    return spec


def _apart(spec: ModuleSpec) -> None:
    """Norms of their own instead of those fused into Transformer Engine's linears: they are modulated before."""
    linear_alone = column_parallel_linear()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm()
    spec.submodules.self_attention.submodules.linear_qkv = linear_alone
    mlp = spec.submodules.mlp
    inner = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    inner.linear_fc1 = linear_alone


class DiffusionTransformer(MegatronModule):
    """The layers of a DiT that one chunk holds: patch, position and timestep embeddings on the first, last modulation
    and output on the last.

    Between chunks travel ``hidden`` ``[t, 1, h]``, the prompts' ``condition`` ``[prompt tokens, 1, h]``, the embedded
    ``timestep`` ``[clips, h]`` and its ``modulation`` ``[clips, 6 h]``. So there is one timestep embedding, whose
    gradient arrives through all layers, rather than copies on all ranks to be kept equal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        *,
        channels: int,
        patch: Grid,
        largest: Grid,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
        pg_collection: Any = None,
    ):
        """Latents have ``channels`` channels and at most ``largest`` patches (in frames, rows, columns)."""
        super().__init__(config=config)
        self.patch, self.largest, self.first, self.last = patch, largest, first, last
        self._share = share_of(config, pg_collection)
        hidden, values = config.hidden_size, channels * math.prod(patch)
        if first:
            self.patch_embedding = linear(config, values, hidden, config.init_method)
            self.positions = torch.nn.ModuleList(_table(config, count) for count in largest)
            self.timestep_fc1 = linear(config, FREQUENCIES, hidden, config.init_method, gather=False)
            self.timestep_fc2 = RowParallelLinear(
                hidden, hidden, config=config, init_method=config.init_method, bias=True, input_is_parallel=True,
                skip_bias_add=False,
            )  # fmt: skip
            self.modulation = linear(config, hidden, 6 * hidden, torch.nn.init.zeros_)
        self.decoder = TransformerBlock(
            config, layer_spec, pre_process=True, post_process=last, vp_stage=vp_stage, pg_collection=pg_collection
        )
        if last:
            self.last_modulation = linear(config, hidden, 2 * hidden, torch.nn.init.zeros_)
            self.output = linear(config, hidden, values, torch.nn.init.zeros_)

    def forward(
        self,
        grids: Sequence[Grid],
        prompt_lengths: Sequence[int],
        state: Tensors,
        patches: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> Any:
        """Clips of these ``grids``, in patches.

        On the first chunk ``state`` is the condition alone, ``patches`` ``[t, values]`` are the noisy latents and
        ``timesteps`` ``[clips]`` (0: noise, 1: data). Returns the state for the next chunk, or from the last one the
        velocity of each patch, ``[t, values]`` in float32. Context-parallel ranks take and return their rows of what is
        of patches (:class:`.share.Share`), but for ``patches``, which are all."""
        lengths = tuple(math.prod(grid) for grid in grids)
        here = self._share.lengths(lengths)
        if self.first:
            assert patches is not None
            assert timesteps is not None
            state = state | self._embed(grids, patches, timesteps)
        hidden = self.decoder(
            state["hidden"], attention_mask=None, context=state["condition"], context_mask=state["modulation"],
            packed_seq_params=pack(lengths, state["hidden"].device, prompt_lengths, here),
        )  # fmt: skip
        if not self.last:
            return state | {"hidden": hidden}
        shift, scale = applied(self.last_modulation, torch.nn.functional.silu(state["timestep"])).chunk(2, dim=-1)
        return applied(self.output, modulate(hidden, shift, scale, here)).squeeze(1).float()

    def _embed(self, grids: Sequence[Grid], patches: torch.Tensor, timesteps: torch.Tensor) -> Tensors:
        dtype = self.config.params_dtype
        lengths = tuple(math.prod(grid) for grid in grids)
        positions = self._share.rows(self._positions(grids, patches.device), lengths)
        hidden = applied(self.patch_embedding, self._share.rows(patches, lengths).to(dtype)) + self._embedded(positions)
        embedded = applied(self.timestep_fc1, sinusoid(timesteps).to(dtype))
        embedded = applied(self.timestep_fc2, torch.nn.functional.silu(embedded))
        modulation = applied(self.modulation, torch.nn.functional.silu(embedded))
        return {"hidden": hidden.unsqueeze(1), "timestep": embedded, "modulation": modulation}

    def _positions(self, grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
        """Frame, row and column of all patches, ``[t, 3]``."""
        places = []
        for grid in grids:
            if any(size > most for size, most in zip(grid, self.largest, strict=True)):
                raise ValueError(f"a clip of {grid} patches; this model has positions for {self.largest} at most")
            axes = [torch.arange(size, device=device) for size in grid]
            places.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
        return torch.cat(places, dim=1).T

    def _embedded(self, positions: torch.Tensor) -> torch.Tensor:
        """Learned positions, ``[t, h]``."""
        frame, row, column = (table(own) for table, own in zip(self.positions, positions.T, strict=True))
        return frame + row + column


def sinusoid(timesteps: torch.Tensor) -> torch.Tensor:
    """Sines and cosines ``[clips, FREQUENCIES]`` of timesteps between 0 and 1 (as of a thousand steps), float32."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = 1000.0 * timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def patchify(latent: torch.Tensor, patch: Grid) -> torch.Tensor:
    """Latent ``[channels, frames, height, width]`` as patches ``[frames * rows * columns, values]``."""
    c, f, h, w = latent.shape
    a, b, d = patch
    split = latent.reshape(c, f // a, a, h // b, b, w // d, d)
    return split.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * a * b * d)


def unpatchify(patches: torch.Tensor, grid: Grid, patch: Grid) -> torch.Tensor:
    """Inverse of :func:`patchify` for a clip of ``grid`` patches."""
    (f, h, w), (a, b, d) = grid, patch
    split = patches.reshape(f, h, w, -1, a, b, d).permute(3, 0, 4, 1, 5, 2, 6)
    return split.reshape(-1, f * a, h * b, w * d)


def _table(config: TransformerConfig, count: int) -> torch.nn.Embedding:
    table = torch.nn.Embedding(count, config.hidden_size, dtype=config.params_dtype, device=_device(config))
    if config.perform_initialization:
        config.init_method(table.weight)
    return table


def _zeros(config: TransformerConfig, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=config.params_dtype, device=_device(config))


def _device(config: TransformerConfig) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
