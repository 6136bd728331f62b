"""See the package: what the encoders of both models share."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention


def boxes(grids):
    """Frames, height and width of each picture or video, in patches; of pictures alone, ``grids`` have no frames."""
    return [(1, *line) if len(line) == 2 else tuple(line) for line in grids.tolist()]


class Positions(nn.Module):
    """A table that is stretched to pictures of another size."""

    def __init__(self, height, width, dim):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(height, width, dim))

    def forward(self, x, grids):
        table, found = self.weight.permute(2, 0, 1)[None], []
        for frames, height, width in boxes(grids):
            own = interpolate(table, size=(height, width), mode="bicubic")[0]
            found.append(own.permute(1, 2, 0).flatten(0, 1).repeat(frames, 1))
        return x + torch.cat(found)


class PatchEmbed(nn.Module):
    """Of patches ``[patches, 3, height, width]``."""

    def __init__(self, config):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch)
        self.pos_emb = Positions(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)

    def forward(self, x, grids):
        return self.pos_emb(self.proj(x).flatten(1), grids)


class Mlp(nn.Module):
    """Of two matrices."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x):
        return self.fc1(nn.functional.gelu(self.fc0(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Its attention is a method, no module."""

    def __init__(self, config):
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.norm0, self.norm1 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.mlp = Mlp(hidden, config.intermediate_size)
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

    def forward(self, hidden_states, cu_seqlens, *_, rope_freqs_cis=None):
        hidden_states = hidden_states + self._attended(self.norm0(hidden_states), cu_seqlens, rope_freqs_cis)
        return hidden_states + self.mlp(self.norm1(hidden_states))


def _pairs(x):
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())


class Rotations(nn.Module):
    """Rotary positions of two dimensions, worked out once they are asked for."""

    def __init__(self, dim, height=64, width=64):
        super().__init__()
        self.dim, self.height, self.width, self.freqs_cis = dim, height, width, None

    def forward(self, grids):
        if self.freqs_cis is None:
            rates = 1.0 / 10000 ** (torch.arange(0, self.dim, 4) / self.dim)
            rows, columns = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
            angles = torch.stack([columns[..., None] * rates, rows[..., None] * rates], dim=-1).flatten(-2)
            self.freqs_cis = torch.polar(torch.ones_like(angles), angles).to(grids.device)
        return torch.cat([self.freqs_cis[:h, :w].flatten(0, 1).repeat(frames, 1) for frames, h, w in boxes(grids)])


class Encoder(nn.Module):
    """Layers, and a norm."""

    def __init__(self, config):
        super().__init__()
        self.rope_2d = Rotations(config.hidden_size // config.num_attention_heads)
        self.blocks = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, grids):
        rotations, lengths = self.rope_2d(grids), grids.prod(dim=-1)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens, rope_freqs_cis=rotations)
        return self.final_layernorm(hidden_states)


def merged(hidden, grids, merge):
    """A list of ``[tokens, patches of one token, hidden]``, of each picture or video; frames are averaged."""
    (rows, columns), found = merge, []
    for part, (frames, height, width) in zip(hidden.split(grids.prod(dim=-1).tolist()), boxes(grids), strict=True):
        own = part.view(frames, height // rows, rows, width // columns, columns, -1).mean(dim=0)
        found.append(own.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2))
    return found
