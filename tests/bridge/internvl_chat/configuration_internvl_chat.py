"""See the package."""

from typing import ClassVar

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Of the encoder."""

    model_type = "intern_vit_6b"

    def __init__(
        self, num_channels=3, patch_size=14, image_size=224, qkv_bias=False, hidden_size=3200, num_attention_heads=25,
        intermediate_size=12800, qk_normalization=True, num_hidden_layers=48, use_flash_attn=True, hidden_act="gelu",
        norm_type="rms_norm", layer_norm_eps=1e-6, dropout=0.0, drop_path_rate=0.0, attention_dropout=0.0,
        initializer_factor=0.1, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)


class InternVLChatConfig(PretrainedConfig):
    """Of the whole model; the language model's config is that of its architecture."""

    model_type = "internvl_chat"
    sub_configs: ClassVar = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}

    def __init__(self, vision_config=None, llm_config=None, select_layer=-1, force_image_size=None,
                 downsample_ratio=0.5, template=None, ps_version="v2", **kwargs):  # fmt: skip
        seen, read = vision_config or {}, llm_config or {"model_type": "qwen2"}
        self.vision_config = InternVisionConfig(**seen) if isinstance(seen, dict) else seen
        self.llm_config = AutoConfig.for_model(**read) if isinstance(read, dict) else read
        self.select_layer, self.force_image_size = select_layer, force_image_size
        self.downsample_ratio, self.template, self.ps_version = downsample_ratio, template, ps_version
        super().__init__(**kwargs)
