"""See the package."""

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, CausalLMOutput

from .configuration_internvl_chat import InternVisionConfig, InternVLChatConfig


def _norm(config):
    kind = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class InternVisionEmbeddings(nn.Module):
    """Patches behind a class token, with positions that are stretched to pictures of another size."""

    def __init__(self, config):
        super().__init__()
        side, hidden = config.image_size // config.patch_size, config.hidden_size
        self.side = side
        self.class_embedding = nn.Parameter(torch.randn(1, 1, hidden))
        self.patch_embedding = nn.Conv2d(3, hidden, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, side**2 + 1, hidden))

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values)
        first, rest = self.position_embedding.split([1, self.side**2], dim=1)
        table = rest.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        patches = patches + interpolate(table, size=patches.shape[-2:], mode="bicubic")
        start = (self.class_embedding + first).expand(len(patches), -1, -1)
        return torch.cat([start, patches.flatten(2).transpose(1, 2)], dim=1)


class InternAttention(nn.Module):
    """All patches of a tile see each other."""

    def __init__(self, config):
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias=config.qkv_bias), nn.Linear(hidden, hidden)
        if config.qk_normalization:
            self.q_norm, self.k_norm = (nn.RMSNorm(hidden, eps=config.layer_norm_eps) for _ in range(2))

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    """Of two matrices."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class InternVisionEncoderLayer(nn.Module):
    """With a scale behind each half."""

    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.ls1, self.ls2 = (
            nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size)) for _ in range(2)
        )

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2


class InternVisionEncoder(nn.Module):
    """It recomputes its layers unless it is told otherwise, and by torch's own choice of how."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = True

    def forward(self, inputs_embeds, output_hidden_states=None, return_dict=None):
        hidden_states, every = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
            every.append(hidden_states)
        kept = tuple(every) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=kept)


class InternVisionModel(PreTrainedModel):
    """Hidden states of each patch of each tile, and of the class token before them."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.encoder = InternVisionEmbeddings(config), InternVisionEncoder(config)

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        if pixel_embeds is None:
            if pixel_values.dim() != 4:
                raise ValueError(f"pixels of {pixel_values.shape}")
            pixel_embeds = self.embeddings(pixel_values)
        found = self.encoder(inputs_embeds=pixel_embeds, output_hidden_states=output_hidden_states, return_dict=True)
        last = found.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0], hidden_states=found.hidden_states
        )


class InternVLChatModel(PreTrainedModel):
    """Logits of tokens and tiles. Which token stands for tiles, its user says."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.select_layer, self.downsample_ratio = config.select_layer, config.downsample_ratio
        self.ps_version, self.img_context_token_id = config.ps_version, None
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        merged, hidden = int(1 / self.downsample_ratio) ** 2, config.llm_config.hidden_size
        width = config.vision_config.hidden_size * merged
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def pixel_shuffle(self, x, scale_factor=0.5):
        times = int(1 / scale_factor)
        tiles, rows, columns, width = x.shape
        x = x.view(tiles, rows // times, times, columns // times, times, width).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return x.transpose(1, 2) if self.ps_version == "v1" else x

    def extract_feature(self, pixel_values):
        every = self.select_layer != -1
        found = self.vision_model(pixel_values=pixel_values, output_hidden_states=every, return_dict=True)
        seen = (found.hidden_states[self.select_layer] if every else found.last_hidden_state)[:, 1:]
        side = int(seen.shape[1] ** 0.5)
        seen = self.pixel_shuffle(seen.unflatten(1, (side, side)), scale_factor=self.downsample_ratio)
        return self.mlp1(seen.flatten(1, 2))

    def forward(self, pixel_values=None, input_ids=None):
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            where = (input_ids == self.img_context_token_id)[..., None]
            embedded = embedded.masked_scatter(where, self.extract_feature(pixel_values))
        return CausalLMOutput(logits=self.language_model(inputs_embeds=embedded).logits)
