"""See the package."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import DeepseekV3ForCausalLM, PretrainedConfig, PreTrainedModel

from .configuration_kimi_k25 import KimiK25Config


class VisionTowerConfig(PretrainedConfig):
    """What the encoder needs of a model's ``vision_config``."""

    model_type = "moonvit3d"

    def __init__(self, config=None, **kwargs):
        super().__init__(**kwargs)
        for name in ("patch_size", "init_pos_emb_height", "init_pos_emb_width", "merge_kernel_size"):
            setattr(self, name, getattr(config, name, None))
        for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size"):
            setattr(self, name, getattr(config, f"vt_{name}", None))


class ProjectorConfig:
    """What the projector needs of it."""

    def __init__(self, config):
        self.mm_hidden_size, self.hidden_size = config.mm_hidden_size, config.text_hidden_size
        self.merge_kernel_size, self.projector_ln_eps = config.merge_kernel_size, config.projector_ln_eps


class _Positions(nn.Module):
    def __init__(self, height, width, dim):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(height, width, dim))

    def forward(self, x, grid_thws):
        table, found = self.weight.permute(2, 0, 1)[None], []
        for frames, height, width in grid_thws.tolist():
            own = interpolate(table, size=(height, width), mode="bicubic")[0]
            found.append(own.permute(1, 2, 0).flatten(0, 1).repeat(frames, 1))
        return x + torch.cat(found)


class _PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch)
        self.pos_emb = _Positions(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)

    def forward(self, x, grid_thws):
        return self.pos_emb(self.proj(x).flatten(1), grid_thws)


class _Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x):
        return self.fc1(nn.functional.gelu(self.fc0(x), approximate="tanh"))


class MoonViTEncoderLayer(nn.Module):
    """Its attention is a method, no module."""

    def __init__(self, config):
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.norm0, self.norm1 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.mlp = _Mlp(hidden, config.intermediate_size)
        self.wqkv, self.wo = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def _attended(self, x, cu_seqlens, rotations):
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = (torch.view_as_real(_pairs(t) * rotations[:, None]).flatten(-2) for t in (q, k))
        bounds = cu_seqlens.tolist()
        parts = [
            scaled_dot_product_attention(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
            for a, b in pairwise(bounds)
        ]
        return self.wo(torch.cat(parts).flatten(1))

    def forward(self, hidden_states, cu_seqlens, max_seqlen, rope_freqs_cis=None):
        hidden_states = hidden_states + self._attended(self.norm0(hidden_states), cu_seqlens, rope_freqs_cis)
        return hidden_states + self.mlp(self.norm1(hidden_states))


def _pairs(x):
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())


class MoonViT3dEncoder(nn.Module):
    """Rotary positions of two dimensions, layers, and a norm."""

    def __init__(self, config):
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.blocks = nn.ModuleList([MoonViTEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, grid_thws):
        rates = 1.0 / 10000 ** (torch.arange(0, self.dim, 4) / self.dim)
        found = []
        for frames, height, width in grid_thws.tolist():
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            angles = torch.stack([columns.flatten()[:, None] * rates, rows.flatten()[:, None] * rates], dim=-1)
            found.append(angles.flatten(1).repeat(frames, 1))
        angles = torch.cat(found).to(hidden_states.device)
        lengths = grid_thws.prod(dim=-1)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        rotations = torch.polar(torch.ones_like(angles), angles)
        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens, lengths.max(), rope_freqs_cis=rotations)
        return self.final_layernorm(hidden_states)


class MoonViT3dPretrainedModel(PreTrainedModel):
    """A list of ``[tokens, patches of one token, hidden]``, of each picture or video; frames are averaged."""

    config_class = VisionTowerConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.merge_kernel_size = config.merge_kernel_size
        self.patch_embed, self.encoder = _PatchEmbed(config), MoonViT3dEncoder(config)

    def forward(self, pixel_values, grid_thws):
        hidden = self.encoder(self.patch_embed(pixel_values, grid_thws), grid_thws)
        rows, columns = self.merge_kernel_size
        found = []
        for part, (frames, height, width) in zip(
            hidden.split(grid_thws.prod(dim=-1).tolist()), grid_thws.tolist(), strict=True
        ):
            own = part.view(frames, height // rows, rows, width // columns, columns, -1).mean(dim=0)
            found.append(own.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2))
        return found


class PatchMergerMLP(nn.Module):
    """Patches of a token side by side, to the language model's width."""

    def __init__(self, config):
        super().__init__()
        merged = config.mm_hidden_size * config.merge_kernel_size[0] * config.merge_kernel_size[1]
        self.pre_norm = nn.LayerNorm(config.mm_hidden_size, eps=config.projector_ln_eps)
        self.proj = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.hidden_size))

    def forward(self, x):
        return [self.proj(self.pre_norm(own).flatten(1)) for own in x]


class KimiK25ForConditionalGeneration(PreTrainedModel):
    """Logits of tokens and pictures."""

    config_class = KimiK25Config
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = MoonViT3dPretrainedModel(VisionTowerConfig(config.vision_config))
        self.mm_projector = PatchMergerMLP(ProjectorConfig(config.vision_config))
        self.language_model = DeepseekV3ForCausalLM(config.text_config)

    def forward(self, input_ids, pixel_values=None, image_grid_thw=None):
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = torch.cat(self.mm_projector(self.vision_tower(pixel_values, image_grid_thw)))
            embedded = embedded.masked_scatter((input_ids == self.config.media_placeholder_token_id)[..., None], seen)
        return self.language_model(inputs_embeds=embedded)
