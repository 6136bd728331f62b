"""See the package."""

from typing import ClassVar

from transformers import DeepseekV3Config, PretrainedConfig


class MoonViTConfig(PretrainedConfig):
    """Of the encoder."""

    model_type = "moonvit"

    def __init__(
        self, patch_size=14, init_pos_emb_height=64, init_pos_emb_width=64, num_attention_heads=16,
        num_hidden_layers=27, hidden_size=1152, intermediate_size=4304, merge_kernel_size=(2, 2), **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)


class KimiVLConfig(PretrainedConfig):
    """Of the whole model."""

    model_type = "kimi_vl"
    sub_configs: ClassVar = {"text_config": DeepseekV3Config, "vision_config": MoonViTConfig}

    def __init__(self, text_config=None, vision_config=None, media_placeholder_token_id=163605, pad_token_id=0,
                 ignore_index=-100, **kwargs):  # fmt: skip
        given, seen = text_config or {}, vision_config or {}
        self.text_config = DeepseekV3Config(**given) if isinstance(given, dict) else given
        self.vision_config = MoonViTConfig(**seen) if isinstance(seen, dict) else seen
        self.media_placeholder_token_id, self.ignore_index = media_placeholder_token_id, ignore_index
        super().__init__(pad_token_id=pad_token_id, **kwargs)
