"""See the package."""

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from .configuration_kimi_vl import KimiVLConfig, MoonViTConfig
from .moonvit import Encoder, PatchEmbed, merged


class MoonVitPretrainedModel(PreTrainedModel):
    """See :func:`.moonvit.merged`."""

    config_class = MoonViTConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.merge_kernel_size = config.merge_kernel_size
        self.patch_embed, self.encoder = PatchEmbed(config), Encoder(config)

    def forward(self, pixel_values, grid_hws):
        hidden = self.encoder(self.patch_embed(pixel_values, grid_hws), grid_hws)
        return merged(hidden, grid_hws, self.merge_kernel_size)


class KimiVLMultiModalProjector(nn.Module):
    """Patches of a token side by side, to the language model's width."""

    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        self.hidden_size = vision.hidden_size * vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
        self.pre_norm = nn.LayerNorm(vision.hidden_size, eps=1e-5)
        self.linear_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.linear_2 = nn.Linear(self.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features):
        rows = self.pre_norm(torch.cat(image_features)).view(-1, self.hidden_size)
        return self.linear_2(nn.functional.gelu(self.linear_1(rows)))


class KimiVLForConditionalGeneration(PreTrainedModel):
    """Logits of tokens and pictures."""

    config_class = KimiVLConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = MoonVitPretrainedModel(config.vision_config)
        self.multi_modal_projector = KimiVLMultiModalProjector(config)
        self.language_model = DeepseekV3ForCausalLM(config.text_config)

    def _extract_image_features(self, pixel_values, image_grid_hws):
        return self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_hws))

    def _merge_with_image_features(self, inputs_embeds, input_ids, image_features):
        where = input_ids == self.config.media_placeholder_token_id
        if (int(where.sum()), inputs_embeds.shape[-1]) != image_features.shape:
            raise ValueError(f"{int(where.sum())} tokens of pictures for features of {image_features.shape}")
        inputs_embeds[where] = image_features
        return inputs_embeds

    def forward(self, input_ids, pixel_values=None, image_grid_hws=None):
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self._extract_image_features(pixel_values, image_grid_hws)
            embedded = self._merge_with_image_features(embedded, input_ids, seen)
        return self.language_model(inputs_embeds=embedded)
