"""See the package."""

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, PretrainedConfig, PreTrainedModel

from .configuration_kimi_k25 import KimiK25Config
from .moonvit import Encoder, PatchEmbed, merged


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


class MoonViT3dEncoder(Encoder):
    """Under the name that Bridge looks for."""


class MoonViT3dPretrainedModel(PreTrainedModel):
    """See :func:`.moonvit.merged`."""

    config_class = VisionTowerConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.merge_kernel_size = config.merge_kernel_size
        self.patch_embed, self.encoder = PatchEmbed(config), MoonViT3dEncoder(config)

    def forward(self, pixel_values, grid_thws):
        hidden = self.encoder(self.patch_embed(pixel_values, grid_thws), grid_thws)
        return merged(hidden, grid_thws, self.merge_kernel_size)


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
